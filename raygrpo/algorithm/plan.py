"""From the summaries of a step's groups to its plan: advantages, weights, minibatches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raygrpo.algorithm.advantages import group_advantages, has_signal
from raygrpo.algorithm.loss import LossConfig, loss_weights_for
from raygrpo.algorithm.window import FinishedGroup
from raygrpo.config import AdvantageSection, RunConfig
from raygrpo.types import GroupSummary, PlannedSample, StepBatch


def loss_config(config: RunConfig) -> LossConfig:
    """The loss that a run minimises."""
    return LossConfig(**config.loss.model_dump(), max_completion_length=config.sampling.max_tokens)


def num_trained_tokens(summary: GroupSummary, index: int, section: AdvantageSection) -> int:
    """Loss tokens of a completion: none when it is truncated and the overlong filter is on."""
    if section.mask_truncated and summary.finishes[index] == "length":
        return 0
    return summary.num_loss_tokens[index]


def make_step_batch(step: int, groups: Sequence[FinishedGroup], config: RunConfig) -> StepBatch:
    """The plan of one step.

    Completions without a score are in no baseline, denominator or minibatch. Overlong-filtered ones
    are in the baseline and count as sequences, not as tokens, and are not computed.
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
        has_signal=any(_teaches(summary, config) for summary in summaries),
    )


def _teaches(summary: GroupSummary, config: RunConfig) -> bool:
    section = config.advantage
    trained = [num_trained_tokens(summary, i, section) > 0 for i in range(len(summary.scores))]
    return has_signal([score.value for score in summary.scores], trained)


def _advantages(summaries: Sequence[GroupSummary], config: RunConfig) -> torch.Tensor:
    width = max(len(summary.scores) for summary in summaries)
    rewards = torch.full((len(summaries), width), math.nan, dtype=torch.float64)
    for row, summary in enumerate(summaries):
        for column, score in enumerate(summary.scores):
            if score.value is not None:
                rewards[row, column] = score.value
    section = config.advantage
    return group_advantages(rewards, baseline=section.baseline, scale=section.scale)


def _minibatch(
    summaries: Sequence[GroupSummary], advantages: torch.Tensor, config: RunConfig
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
