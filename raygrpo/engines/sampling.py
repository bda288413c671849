"""From logits to tokens: the sampled distribution, its logprobs, and inverse-CDF sampling.

Settings act in the order of transformers' logits processors: repetition penalty, forbidden stops,
temperature, top-k, top-p, min-p. Each stage sets what it removes to -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygrpo.types import Sampling


def sample(
    logits: Tensor,  # [R, V] float32
    sampling: Sampling,
    uniforms: Tensor,  # [R] float64 in [0, 1)
    *,
    history: Tensor | None = None,
    early: Tensor | None = None,
    stop_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [R] and their logprobs [R] (nats, float32) under the distribution sampled from.

    ``history`` [R, H] are the ids that the repetition penalty counts as seen (repeats are
    harmless); rows that are ``early`` [R] draw none of ``stop_ids`` [S]. Temperature 0 takes the
    likeliest token, with logprob 0.
    """
    scores = penalise(logits, history, sampling.repetition_penalty)
    if early is not None and stop_ids is not None:
        scores = scores.clone()
        scores[:, stop_ids] = scores[:, stop_ids].masked_fill(early[:, None], -torch.inf)
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    return draw(truncate(scores, sampling), uniforms)


def penalise(logits: Tensor, history: Tensor | None, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of seen ids by ``penalty`` (CTRL, 2019)."""
    if history is None or penalty == 1:
        return logits
    seen = logits.gather(-1, history)
    return logits.scatter(-1, history, torch.where(seen < 0, seen * penalty, seen / penalty))


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Scores [R, V] after temperature, top-k, top-p and min-p; -inf where nothing is drawn."""
    scores = logits if sampling.temperature == 1 else logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        scores = _nucleus(scores, sampling.top_p)
    if sampling.min_p > 0:
        probs = scores.softmax(-1)
        least = probs.amax(-1, keepdim=True) * sampling.min_p
        scores = scores.masked_fill(probs < least, -torch.inf)
    return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of likeliest tokens whose mass is at least ``top_p``."""
    ordered, ids = scores.sort(-1)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(-1, ids, removed), -torch.inf)


def draw(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one id a row from softmax(scores) by inverting its cumulative distribution.

    Returns ids [R] and logprobs [R]. The id is the first whose cumulative mass exceeds
    ``uniform * total``, so that its own mass is never zero; the target is kept below the total,
    which rounding could otherwise reach.
    """
    top = scores.amax(-1, keepdim=True)
    cumulative = (scores - top).exp_().cumsum(-1)
    total = cumulative[:, -1:]
    target = (uniforms[:, None] * total).to(total.dtype)
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, target, right=True)
    logprobs = scores.gather(-1, ids) - top - total.log()
    return ids[:, 0], logprobs[:, 0]
