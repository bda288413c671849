"""Evaluations: the same prompts with the same randomness each time, on one version."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from raygrpo.config import RunConfig
from raygrpo.config.sections import reward_name
from raygrpo.errors import ConfigError, nearest
from raygrpo.tracking.metrics import evaluation_metrics
from raygrpo.training.state import BestSoFar, Constant
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

Order = GroupRequest | Group


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
