"""What a step needs to know before its first optimizer update, by a forward without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raygrpo.algorithm.entropy import entropy_threshold, top_entropy_mask
from raygrpo.algorithm.loss import LossConfig
from raygrpo.learner.policy import PolicyInputs


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
    that of one optimizer update: of a minibatch, over all its microbatches on all ranks.
    """
    needs_old = len(batches) > 1 and not config.anchored_at_sampler
    if not needs_old and config.top_entropy_frac == 1:
        return [[Held() for _ in batch] for batch in batches]
    held = []
    for batch in batches:
        outputs = [forward(inputs) for inputs in batch]
        pairs = [(e, i.loss_mask.bool()) for (_, e), i in zip(outputs, batch, strict=True)]
        masks: list[Tensor | None] = [None] * len(batch)
        if config.top_entropy_frac < 1:
            trained = [entropies[mask].float() for entropies, mask in pairs]
            everything = torch.cat(trained) if trained else torch.zeros(0)
            threshold = entropy_threshold(everything, config.top_entropy_frac, sum_over_ranks)
            masks = [top_entropy_mask(entropies, mask, threshold) for entropies, mask in pairs]
        held.append(
            [
                Held(old_logprobs=logprobs if needs_old else None, policy_mask=mask)
                for (logprobs, _), mask in zip(outputs, masks, strict=True)
            ]
        )
    return held
