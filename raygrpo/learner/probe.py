"""The learner's logprobs of the run's probe; a generator must reproduce them after a load."""

from __future__ import annotations

import numpy as np

from raygrpo.errors import NumericError
from raygrpo.learner.base import Learner
from raygrpo.types import Microbatch
from raygrpo.weights.probe import probe_tokens
from raygrpo.weights.types import Probe


def score_probe(learner: Learner) -> Probe:
    """Scores the run's probe under the learner's weights; every rank must take part.

    This is a forward pass without gradient: no state changes, random states included.

    Raises:
        NumericError: a logprob is not finite, so that no generator can use the weights.
    """
    text = learner.hf_model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    tokens = probe_tokens(text.vocab_size, learner.config.seed, limit)
    logprobs = learner.score(_microbatch(tokens))[0]
    if not np.isfinite(logprobs).all():
        raise NumericError(
            "the learner's weights give logprobs that are not finite",
            "after an update: lower optimizer.lr, and resume from the last checkpoint; before the "
            "first one: look at the model's weights and model.dtype",
        )
    return Probe(token_ids=tokens, logprobs=tuple(logprobs.tolist()))


def _microbatch(tokens: tuple[int, ...]) -> Microbatch:
    """One plain row in which every token but the first one is scored."""
    ids = np.array([tokens], np.int32)
    positions = np.arange(ids.size, dtype=np.int32)[None]
    zeros = np.zeros_like(ids)
    return Microbatch(
        token_ids=ids,
        positions=positions,
        segment_ids=zeros,
        parent_ids=zeros - 1,
        predictors=np.maximum(positions - 1, 0),
        loss_mask=positions > 0,
        sampler_logprobs=np.zeros(ids.shape, np.float32),
        sequence_ids=zeros,
        advantages=np.zeros(1, np.float32),
        loss_weights=np.zeros(1, np.float32),
    )
