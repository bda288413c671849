"""What a loss gives each token as gradient, before all of the batch's logprobs are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raygrpo.algorithm.logprobs import TokenGradient
from raygrpo.algorithm.loss import loss_and_stats
from raygrpo.algorithm.loss_inputs import LossConfig, LossInputs


def is_token_separable(config: LossConfig) -> bool:
    """Whether a token's gradient follows from its own logprob, its entropy and what is stored.

    Not so where a sequence's logprobs act together: in gspo's ratio, in corrections by sequence,
    and in the off-policy sequence mask.
    """
    return (
        config.loss != "gspo"
        and (config.correction == "none" or config.correction_level == "token")
        and config.off_policy_threshold is None
    )


def token_gradient(
    inputs: LossInputs, rows: Tensor, columns: Tensor, config: LossConfig
) -> TokenGradient | None:
    """The gradients of `policy_loss` by logprobs and entropies of any of the tokens [N] named.

    None where the loss is not separable by token. ``inputs.logprobs`` and ``inputs.entropies`` are
    not read; ``loss_weights``, and with a top-entropy mask ``policy_mask``, must be given.
    """
    masked = config.top_entropy_frac == 1 or inputs.policy_mask is not None
    if inputs.loss_weights is None or not masked or not is_token_separable(config):
        return None
    grids = {
        name: getattr(inputs, name)
        for name in ("old_logprobs", "sampler_logprobs", "ref_logprobs", "loss_mask")
    }
    grids |= {"sequence_ids": inputs.sequence_ids, "policy_mask": inputs.policy_mask}
    flat = {k: None if grid is None else grid[rows, columns] for k, grid in grids.items()}

    @torch.enable_grad()
    def gradient(
        which: slice | Tensor, logprobs: Tensor, entropies: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        part: dict[str, Any] = {k: v if v is None else v[None, which] for k, v in flat.items()}
        leaf = logprobs.detach()[None].requires_grad_()
        bonus = entropies.detach()[None].requires_grad_()
        loss, _ = loss_and_stats(replace(inputs, logprobs=leaf, entropies=bonus, **part), config)
        leaves = (leaf, bonus) if config.entropy_coef else (leaf,)
        by_logprob, *by_entropy = torch.autograd.grad(loss, leaves)
        return by_logprob[0], by_entropy[0][0] if by_entropy else None

    return gradient
