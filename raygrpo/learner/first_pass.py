"""What a step needs to know before its first optimizer update, by a forward without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raygrpo.algorithm.entropy import entropy_threshold, top_entropy_mask
from raygrpo.algorithm.loss import LossConfig
from raygrpo.learner.inputs import PolicyInputs


@dataclass(slots=True)
class Held:
    """What a microbatch keeps for a whole step, [B, T].

    ``old_logprobs``: before the step's first update; None until its first own forward gives them.
    ``policy_mask``: tokens that carry the policy loss; None where all do.
    """

    old_logprobs: Tensor | None = None
    policy_mask: Tensor | None = None


@torch.no_grad()
def first_pass(
    batches: Sequence[Sequence[PolicyInputs]],
    forward: Callable[[PolicyInputs], tuple[Tensor, Tensor]],
    sum_over_ranks: Callable[[float], float],
    config: LossConfig,
) -> list[list[Held]]:
    """``[minibatch][microbatch]`` of a step; costs a forward over the StepBatch, or nothing.

    Old logprobs are needed with several minibatches, unless the ratio is to the sampler: with one,
    its first pass gives them. Entropies are needed for the top-entropy mask, whose threshold is
    that of the step: of all its minibatches on all ranks.
    """
    needs_old = len(batches) > 1 and not config.anchored_at_sampler
    if not needs_old and config.top_entropy_frac == 1:
        return [[Held() for _ in batch] for batch in batches]
    held: list[list[Held]] = []
    found = []
    for batch in batches:
        held.append([])
        for inputs in batch:
            logprobs, entropies = forward(inputs)
            held[-1].append(Held(old_logprobs=logprobs if needs_old else None))
            found.append((held[-1][-1], entropies, inputs.loss_mask.bool()))
    if config.top_entropy_frac < 1:
        trained = [entropies[mask].float() for _, entropies, mask in found]
        everything = torch.cat(trained) if trained else torch.zeros(0)
        threshold = entropy_threshold(everything, config.top_entropy_frac, sum_over_ranks)
        for item, entropies, mask in found:
            item.policy_mask = top_entropy_mask(entropies, mask, threshold)
    return held
