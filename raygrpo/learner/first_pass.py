"""The forward pass without gradient that may precede a step's first optimizer update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from raygrpo.algorithm.entropy import entropy_threshold, top_entropy_mask
from raygrpo.algorithm.loss import LossConfig
from raygrpo.learner.inputs import PolicyInputs

if TYPE_CHECKING:
    from raygrpo.algorithm.shapes import BoolBT, FloatBT


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """The tensors that a microbatch keeps for a whole step.

    Attributes:
        old_logprobs: before the step's first update; None where the microbatch's first update
            computes them itself.
        policy_mask: tokens that carry the policy loss; None where all do.
    """

    old_logprobs: FloatBT | None = None
    policy_mask: BoolBT | None = None


@torch.no_grad()
def first_pass(
    batches: Sequence[Sequence[PolicyInputs]],
    forward: Callable[[PolicyInputs], tuple[FloatBT, FloatBT]],
    sum_over_ranks: Callable[[float], float],
    config: LossConfig,
) -> list[list[StepCache]]:
    """``[minibatch][microbatch]`` of a step, by a forward over the StepBatch where one is needed.

    Several minibatches need old logprobs, unless the ratio is to the sampler; a single minibatch
    takes those of its first update. The top-entropy mask needs entropies: its threshold covers the
    whole step, all minibatches on all ranks.
    """
    needs_old = len(batches) > 1 and not config.anchored_at_sampler
    needs_mask = config.top_entropy_frac < 1
    if not (needs_old or needs_mask):
        return [[StepCache() for _ in batch] for batch in batches]
    found = [[(*forward(inputs), inputs.loss_mask.bool()) for inputs in batch] for batch in batches]
    threshold = 0.0
    if needs_mask:
        trained = [entropies[mask] for batch in found for _, entropies, mask in batch]
        everything = torch.cat(trained) if trained else torch.zeros(0)
        threshold = entropy_threshold(everything, config.top_entropy_frac, sum_over_ranks)
    return [
        [
            StepCache(
                old_logprobs=logprobs if needs_old else None,
                policy_mask=top_entropy_mask(entropies, mask, threshold) if needs_mask else None,
            )
            for logprobs, entropies, mask in batch
        ]
        for batch in found
    ]
