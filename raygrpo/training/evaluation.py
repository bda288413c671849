"""Evaluations: the same prompts with the same randomness each time, on one version."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from raygrpo.algorithm.correctness import judged, majority_correct, pass_at_k, pass_rate
from raygrpo.config import RunConfig
from raygrpo.tracking.metrics import completion_metrics, reward_metrics
from raygrpo.types import (
    Group,
    GroupRequest,
    GroupSummary,
    Prompt,
    Version,
)

Order = GroupRequest | Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """An answer given to every prompt, and the mean reward that it earns."""

    answer: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSoFar:
    """The best evaluation so far by ``metric``; a leading ``-`` means that lower is better.

    ``step`` is -1 before the first; ``num_since`` evaluations came after it. ``ended_at`` is the
    ``train.steps`` of a run that ended early for want of a better one, else 0.
    """

    metric: str
    step: int = -1
    value: float = math.nan
    num_since: int = 0
    ended_at: int = 0

    def take(self, step: int, metrics: Mapping[str, float], config: RunConfig) -> BestSoFar:
        """After another evaluation; one without the metric is no better one."""
        if not self.metric:
            return self
        value = metrics.get(self.metric.removeprefix("-"), math.nan)
        gain = self.value - value if self.metric.startswith("-") else value - self.value
        if math.isfinite(value) and (self.step < 0 or gain > 0):
            return BestSoFar(metric=self.metric, step=step, value=value)
        later = replace(self, num_since=self.num_since + 1, ended_at=config.train.steps)
        return later if later.has_ended(config) else replace(later, ended_at=0)

    def has_ended(self, config: RunConfig) -> bool:
        """Whether a run in this state trains no further."""
        return self.ended_at > 0 and 0 < config.eval.best.patience <= self.num_since

    def resumed(self, config: RunConfig) -> BestSoFar:
        """For a run that goes on: another metric starts anew, and so does the patience of a run
        that ended early and is given more steps."""
        if self.metric != (config.eval.best.metric or ""):
            return BestSoFar(metric=config.eval.best.metric or "")
        if 0 < self.ended_at < config.train.steps:
            return replace(self, num_since=0, ended_at=0)
        return self

    def fact(self) -> dict[str, Any] | None:
        """What run.json says of it."""
        if self.step < 0:
            return None
        return {"step": self.step, "metric": self.metric, "value": self.value}


class Evaluation:
    """The groups of an evaluation until all have come back.

    ``constants`` are answers given to every prompt, under negative ids, and scored along with it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        version: Version,
        config: RunConfig,
        constants: Sequence[Group] = (),
    ) -> None:
        drawn = config.sampling.settings()
        settings = [replace(drawn, num_completions=1, temperature=0.0)]
        if config.eval.num_completions:
            settings.append(replace(drawn, num_completions=config.eval.num_completions))
        # Ids are even for greedy groups, odd for sampled ones: each keeps its random numbers.
        self._orders: dict[int, Order] = {
            2 * index + sampled: GroupRequest(
                stream="eval",
                group_id=2 * index + sampled,
                attempt=0,
                prompt=prompt,
                seed=config.seed,
                sampling=sampling,
                min_version=version,
            )
            for index, prompt in enumerate(prompts)
            for sampled, sampling in enumerate(settings)
        }
        self._constants = {group.request.group_id: group for group in constants}
        self._orders |= self._constants
        self._num_completions = config.eval.num_completions
        self._finished: dict[int, GroupSummary] = {}
        self._dropped: set[int] = set()

    @property
    def orders(self) -> list[Order]:
        """What is to be sent: requests to generate, groups to score."""
        return list(self._orders.values())

    @property
    def done(self) -> bool:
        """Whether every group came back or was given up."""
        return len(self._finished) + len(self._dropped) == len(self._orders)

    def finish(self, summary: GroupSummary) -> None:
        """Takes a finished group."""
        if summary.group_id in self._orders and summary.group_id not in self._dropped:
            self._finished[summary.group_id] = summary

    def drop(self, group_id: int) -> None:
        """Gives up a group; it is counted in ``eval/num_dropped``."""
        if group_id in self._orders and group_id not in self._finished:
            self._dropped.add(group_id)

    def requeue(self, group_id: int) -> Order:
        """What to send again after its worker was lost."""
        self._orders[group_id] = again(self._orders[group_id])
        return self._orders[group_id]

    def metrics(self) -> dict[str, float]:
        """Means over all scored completions; what failed is counted, not scored 0."""
        finished = [self._finished[i] for i in sorted(self._finished) if i >= 0]
        greedy = [summary for summary in finished if summary.group_id % 2 == 0]
        sampled = [summary for summary in finished if summary.group_id % 2]
        metrics = evaluation_metrics(greedy, sampled, self._num_completions)
        return metrics | {"eval/num_dropped": float(sum(i >= 0 for i in self._dropped))}

    def best_constant(self) -> Constant | None:
        """The constant answer with the highest mean reward over the prompts."""
        summaries = [self._finished[i] for i in self._constants if i in self._finished]
        found = []
        answers = next(iter(self._constants.values())).completions if self._constants else ()
        for index, completion in enumerate(answers):
            values = [summary.scores[index].value for summary in summaries]
            if scored := [value for value in values if value is not None]:
                found.append(Constant(answer=completion.text, value=statistics.fmean(scored)))
        return max(found, key=lambda constant: constant.value, default=None)


def again(order: Order) -> Order:
    """The same order as another attempt."""
    if isinstance(order, Group):
        request = replace(order.request, attempt=order.request.attempt + 1)
        return replace(order, request=request)
    return replace(order, attempt=order.attempt + 1)


class Evaluations:
    """The evaluations of a run, one at a time; the best one, and the best constant answer.

    Attributes:
        best: the best evaluation so far.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        constants: Sequence[Group],
        config: RunConfig,
        best: BestSoFar | None = None,
        constant: Constant | None = None,
    ) -> None:
        self._prompts, self._constants, self._config = prompts, constants, config
        self.best = best or BestSoFar(metric=config.eval.best.metric or "")
        self._current: Evaluation | None = None
        self._constant = constant

    @property
    def end_the_run(self) -> bool:
        """Whether nothing better came for so long that the run is to end."""
        return self.best.has_ended(self._config)

    @property
    def under_way(self) -> bool:
        """Whether one was begun and has not been ended or cancelled."""
        return self._current is not None

    @property
    def done(self) -> bool:
        """Whether all groups of the one under way are back."""
        return self._current is not None and self._current.done

    def due(self, step: int) -> bool:
        """Whether the model after ``step`` steps is to be evaluated."""
        every = self._config.eval.eval_steps
        if not every or not self._prompts:
            return False
        return step % every == 0 or step >= self._config.train.steps

    def begin(self, version: Version) -> list[Order]:
        """Starts one; returns what is to be sent. The first one also scores the constants."""
        constants = () if self._constant else self._constants
        self._current = Evaluation(self._prompts, version, self._config, constants)
        return self._current.orders

    def finish(self, summary: GroupSummary) -> None:
        """Takes a finished group; a group of a cancelled evaluation is ignored, also below."""
        if self._current is not None:
            self._current.finish(summary)

    def drop(self, group_id: int) -> None:
        """Gives up a group."""
        if self._current is not None:
            self._current.drop(group_id)

    def requeue(self, group_id: int) -> list[Order]:
        """What to send again after a group's worker was lost."""
        return [] if self._current is None else [self._current.requeue(group_id)]

    def cancel(self) -> None:
        """Forgets the one under way."""
        self._current = None

    def end(self, step: int) -> tuple[dict[str, float], list[tuple[str, dict[str, Any]]]]:
        """Ends the one that is done, of the model after ``step`` steps; metrics and events."""
        assert self._current is not None
        evaluation, self._current = self._current, None
        metrics, events = evaluation.metrics(), []
        if found := evaluation.best_constant():
            self._constant = found
            events.append(("best_constant", asdict(found)))
        if self._constant:
            metrics["eval/best_constant"] = self._constant.value
        self.best = self.best.take(step, metrics, self._config)
        if self.end_the_run:
            events.append(("early_stop", {"best_step": self.best.step}))
        return metrics, events


def evaluation_metrics(
    greedy: Sequence[GroupSummary], sampled: Sequence[GroupSummary], num_completions: int
) -> dict[str, float]:
    """Metrics of an evaluation with ``num_completions`` sampled completions of each prompt.

    Completions without a judgement are in no rate; a prompt with fewer than k judged ones is left
    out of pass@k and counted in ``eval/pass@k/num_left_out``.
    """
    metrics = _means("eval/", sampled) | _means("eval/greedy/", greedy)
    metrics |= _mean("eval/greedy/accuracy", map(pass_rate, greedy))
    if not sampled:
        return metrics
    metrics |= _mean(f"eval/avg@{num_completions}", map(pass_rate, sampled))
    metrics |= _mean(f"eval/maj@{num_completions}", map(majority_correct, sampled))
    verdicts = [judged(summary) for summary in sampled]
    k = 1
    while k <= num_completions:
        rates = [pass_at_k(len(rights), sum(rights), k) for rights in verdicts]
        metrics |= _mean(f"eval/pass@{k}", rates)
        if left_out := rates.count(None):
            metrics[f"eval/pass@{k}/num_left_out"] = float(left_out)
        k *= 2
    return metrics


def _means(prefix: str, summaries: Sequence[GroupSummary]) -> dict[str, float]:
    if not summaries:
        return {}
    scores = [score for summary in summaries for score in summary.scores]
    metrics = {
        "num_completions": float(len(scores)),
        "num_errored": float(sum(score.error is not None for score in scores)),
        **reward_metrics(summaries),
        **completion_metrics(summaries),
    }
    return {prefix + name: value for name, value in metrics.items()}


def _mean(name: str, values: Any) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return {name: statistics.fmean(known)} if known else {}
