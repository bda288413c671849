"""The plan of a step, made of its groups' summaries: advantages, loss weights, minibatches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raygrpo.algorithm.advantages import (
    batch_normalised,
    group_advantages,
    has_signal,
    normalised_sum,
)
from raygrpo.algorithm.loss import LossConfig, loss_weights_for
from raygrpo.algorithm.overlong import overlong_penalty
from raygrpo.config import RunConfig
from raygrpo.config.algorithm import AdvantageSection
from raygrpo.config.sections import reward_name
from raygrpo.types import FinishedGroup, GroupSummary, PlannedSample, Score, StepBatch

if TYPE_CHECKING:
    from jaxtyping import Float


def loss_config(config: RunConfig) -> LossConfig:
    """The loss of a token in this run; ``correction: auto`` is resolved."""
    correction = config.loss.correction_for(
        stale=config.train.max_staleness > 0, renormalised=config.changes_distribution
    )
    return LossConfig(**config.loss.model_dump() | {"correction": correction})


def num_trained_tokens(summary: GroupSummary, index: int, section: AdvantageSection) -> int:
    """Loss tokens of a completion: none where it is truncated and the overlong filter is on."""
    if section.mask_truncated and summary.finishes[index] == "length":
        return 0
    return summary.num_loss_tokens[index]


def make_step_batch(step: int, groups: Sequence[FinishedGroup], config: RunConfig) -> StepBatch:
    """The plan of one step.

    A completion without a score is in no baseline, no denominator and no minibatch. A completion
    under the overlong filter is in no minibatch; the denominators count it as a sequence, not its
    tokens. It is in the baseline, unless ``mask_truncated: exclude`` takes it out.
    """
    summaries = [group.summary for group in groups]
    advantages = _advantages(summaries, config)
    size = len(groups) // config.train.num_minibatches
    minibatches = [
        _minibatch(summaries[start : start + size], advantages[start : start + size], config)
        for start in range(0, len(groups), size)
    ]
    return StepBatch(
        step=step,
        minibatches=tuple(minibatches),
        payloads={group.summary.group_id: group.payload for group in groups},
        versions={
            summary.group_id: (min(summary.oldest), max(summary.newest)) for summary in summaries
        },
        has_signal=any(group.teaches for group in groups),
    )


def signal_values(summary: GroupSummary, config: RunConfig) -> list[float | None]:
    """The values [G] whose differences teach: rewards, with the soft overlong penalty.

    A value is None where there is no score, or where ``mask_truncated: exclude`` leaves the
    completion out. With ``gdpo`` the values are sums of normalised parts: these may differ where
    the sums of the rewards do not.
    """
    section, max_tokens = config.advantage, config.sampling.max_tokens
    if section.scale == "gdpo":
        sums = _normalised_sums([summary], config)[0].tolist()
        return [None if math.isnan(value) else value for value in sums]
    rewards = [None if score is None else score.value for score in _scores(summary, section)]
    if not section.overlong_buffer:
        return rewards
    buffer = section.overlong_buffer * max_tokens
    return [
        None if reward is None else reward + overlong_penalty(length, max_tokens, buffer)
        for reward, length in zip(rewards, summary.lengths, strict=True)
    ]


def _scores(summary: GroupSummary, section: AdvantageSection) -> list[Score | None]:
    """The scores [G] that make the baseline and the scale; None for the other completions."""
    excludes = section.mask_truncated == "exclude"
    # An errored score keeps the parts that did not fail, which do not count.
    return [
        None if score.value is None or (excludes and finish == "length") else score
        for score, finish in zip(summary.scores, summary.finishes, strict=True)
    ]


def teaches(summary: GroupSummary, config: RunConfig) -> bool:
    """Whether a completion that is trained has an advantage; asked once, when the scores come."""
    section = config.advantage
    trained = [num_trained_tokens(summary, i, section) > 0 for i in range(len(summary.scores))]
    return has_signal(signal_values(summary, config), trained, section.baseline)


def _advantages(summaries: Sequence[GroupSummary], config: RunConfig) -> Float[Tensor, "N G"]:
    section = config.advantage
    if section.scale == "gdpo":
        return batch_normalised(_normalised_sums(summaries, config))
    rewards = _table([[[value] for value in signal_values(s, config)] for s in summaries], 1)
    return group_advantages(rewards[:, :, 0], baseline=section.baseline, scale=section.scale)


def _normalised_sums(summaries: Sequence[GroupSummary], config: RunConfig) -> Float[Tensor, "N G"]:
    weights = {reward_name(reward): reward.weight for reward in config.rewards}
    parts = [
        [
            [None if score is None else score.parts.get(name) for name in weights]
            for score in _scores(summary, config.advantage)
        ]
        for summary in summaries
    ]
    return normalised_sum(_table(parts, len(weights)), list(weights.values()))


def _table(
    groups: Sequence[Sequence[Sequence[float | None]]], num_values: int
) -> Float[Tensor, "N G K"]:
    """The values of groups of unlike sizes; NaN for None and where a group is smaller."""
    width = max(map(len, groups))
    table = torch.full((len(groups), width, num_values), math.nan, dtype=torch.float64)
    for row, group in zip(table, groups, strict=True):
        for cells, values in zip(row, group, strict=False):
            filled = [math.nan if value is None else value for value in values]
            cells.copy_(torch.tensor(filled, dtype=torch.float64))
    return table


def _minibatch(
    summaries: Sequence[GroupSummary], advantages: Float[Tensor, "N G"], config: RunConfig
) -> tuple[PlannedSample, ...]:
    rows = [
        (summary, index, num_trained_tokens(summary, index, config.advantage), advantage)
        for summary, group_advantages_G in zip(summaries, advantages.tolist(), strict=True)
        for index, advantage in zip(range(len(summary.scores)), group_advantages_G, strict=False)
        if summary.scores[index].value is not None
    ]
    weights = loss_weights_for(
        config.loss.aggregation,
        [num_tokens for _, _, num_tokens, _ in rows],
        [summary.group_id for summary, _, _, _ in rows],
        config.sampling.max_tokens,
    ).tolist()
    return tuple(
        PlannedSample(
            group_id=summary.group_id,
            completion_index=index,
            prompt_length=summary.prompt_length,
            completion_length=summary.lengths[index],
            num_loss_tokens=num_tokens,
            advantage=advantage,
            loss_weight=weight,
        )
        for (summary, index, num_tokens, advantage), weight in zip(rows, weights, strict=True)
        if num_tokens > 0
    )
