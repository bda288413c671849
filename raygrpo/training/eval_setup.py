"""What a run's evaluations need before the first: a metric that exists, and constant answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, nearest
from raygrpo.rewards.loading import reward_name
from raygrpo.training.evaluation import evaluation_metrics
from raygrpo.types import (
    Completion,
    Group,
    GroupRequest,
    GroupSummary,
    Prompt,
    Sampling,
    Score,
    Version,
)

MAX_CONSTANTS = 8


def check_best_metric(config: RunConfig) -> None:
    """Refuses a ``best.metric`` that no evaluation of this configuration gives.

    Raises:
        ConfigError: an unknown metric, no evaluations, or patience without a metric.
    """
    best = config.eval.best
    if best.metric is None:
        if best.patience:
            raise ConfigError(
                "eval.best.patience needs a metric to wait for", "set eval.best.metric"
            )
        return
    if not config.eval.eval_steps:
        raise ConfigError("eval.best.metric needs evaluations", "set eval.eval_steps")
    known = metric_names(config)
    name = best.metric.removeprefix("-")
    if name not in known:
        raise ConfigError(
            f"eval.best.metric: no evaluation of this run gives {name!r}", nearest(name, known)
        )


def metric_names(config: RunConfig) -> set[str]:
    """The metrics that an evaluation gives in which every completion is scored."""
    names = [reward_name(reward) for reward in config.rewards]
    score = Score(value=1.0, parts=dict.fromkeys(names, 1.0))

    def groups(size: int) -> list[GroupSummary]:
        summary = GroupSummary(
            stream="eval",
            group_id=0,
            attempt=0,
            prompt_id="",
            prompt_length=1,
            lengths=(1,) * size,
            num_loss_tokens=(1,) * size,
            finishes=tuple("stop" for _ in range(size)),
            oldest=(Version(0, 0),) * size,
            newest=(Version(0, 0),) * size,
            scores=(score,) * size,
            answers=("",) * size,
        )
        return [summary, summary] if size else []

    size = config.eval.num_completions
    return set(evaluation_metrics(groups(1), groups(size), size))


def constant_groups(prompts: Sequence[Prompt], config: RunConfig, tokenizer: Any) -> list[Group]:
    """The most frequent reference answers as completions of every prompt; ids are negative.

    The reference is in the first reward's ``column``, else in ``answer``; without it, none.
    """
    column = config.rewards[0].params.get("column", "answer")
    references = [prompt.columns.get(column) for prompt in prompts]
    counted = Counter(str(value) for value in references if value is not None)
    answers = [answer for answer, _ in counted.most_common(MAX_CONSTANTS)]
    if not answers:
        return []
    completions = tuple(written(answer, tokenizer) for answer in answers)
    sampling = Sampling(num_completions=len(answers), max_tokens=config.sampling.max_tokens)
    return [
        Group(
            request=GroupRequest(
                stream="eval",
                group_id=-1 - index,
                attempt=0,
                prompt=prompt,
                seed=config.seed,
                sampling=sampling,
                min_version=Version(0, 0),
            ),
            completions=completions,
        )
        for index, prompt in enumerate(prompts)
    ]


def written(text: str, tokenizer: Any) -> Completion:
    """A completion that nobody sampled: nothing of it is trained."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = np.array(ids or [tokenizer.eos_token_id], np.int32)
    return Completion(
        token_ids=ids,
        logprobs=np.zeros(ids.size, np.float32),
        loss_mask=np.zeros(ids.size, np.bool_),
        text=text,
        finish="stop",
        version_runs=((Version(0, 0), ids.size),),
    )
