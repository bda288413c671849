"""An evaluation: the same prompts with the same random numbers each time, on one version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raygrpo.config import RunConfig
from raygrpo.config.sections import reward_name
from raygrpo.errors import ConfigError, nearest
from raygrpo.tracking.metrics import evaluation_metrics
from raygrpo.types import GroupRequest, GroupSummary, Prompt, Score, Version


class Evaluation:
    """The groups of one evaluation until all have come back: a greedy completion of each prompt,
    and ``eval.num_completions`` sampled ones."""

    def __init__(self, prompts: Sequence[Prompt], version: Version, config: RunConfig) -> None:
        drawn = config.sampling.settings()
        settings = [replace(drawn, num_completions=1, temperature=0.0)]
        if config.eval.num_completions:
            settings.append(replace(drawn, num_completions=config.eval.num_completions))
        # Greedy groups have even ids, sampled ones odd ids: each keeps its random numbers.
        self.requests = [
            GroupRequest(
                stream="eval",
                group_id=2 * index + sampled,
                prompt=prompt,
                seed=config.seed,
                sampling=sampling,
                min_version=version,
            )
            for index, prompt in enumerate(prompts)
            for sampled, sampling in enumerate(settings)
        ]
        self._num_completions = config.eval.num_completions
        self._finished: dict[int, GroupSummary] = {}
        self._num_dropped = 0

    @property
    def done(self) -> bool:
        """Whether every group came back or was given up."""
        return len(self._finished) + self._num_dropped == len(self.requests)

    def finish(self, summary: GroupSummary) -> None:
        """Takes a finished group."""
        self._finished[summary.group_id] = summary

    def drop(self) -> None:
        """Gives up a group."""
        self._num_dropped += 1

    def metrics(self) -> dict[str, float]:
        """Means over all scored completions; a failed completion is counted, not scored 0."""
        finished = [self._finished[group_id] for group_id in sorted(self._finished)]
        greedy = [summary for summary in finished if summary.group_id % 2 == 0]
        sampled = [summary for summary in finished if summary.group_id % 2]
        metrics = evaluation_metrics(greedy, sampled, self._num_completions)
        return metrics | {"eval/num_dropped": float(self._num_dropped)}


def is_due(step: int, config: RunConfig) -> bool:
    """Whether the model after ``step`` steps is to be evaluated."""
    every = config.eval.eval_steps
    return bool(every) and (step % every == 0 or step >= config.train.steps)


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
