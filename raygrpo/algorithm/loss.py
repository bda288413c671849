"""Policy losses: one pure function from per-token logprobs to a globally normalised loss.

The loss of a microbatch, with the masks and KL terms left out, is

    sum over trained tokens of   weight of its sequence  x  factor  x  token loss
                                 (loss_weights_for)      (_factor)     (surrogates.token_losses)

The denominator of the aggregation covers one whole optimizer update. It is part of the weights, so
the loss of an update is the plain sum of `policy_loss` over its microbatches and ranks, whatever
the split. docs/algorithms.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from raygrpo.algorithm.corrections import correction, off_policy_sequences
from raygrpo.algorithm.logprobs import ExpectedGrad
from raygrpo.algorithm.surrogates import (
    LossConfig,
    LossTokens,
    StatsLater,
    stat,
    token_losses,
)
from raygrpo.types import Stat

if TYPE_CHECKING:
    from jaxtyping import Shaped

    from raygrpo.algorithm.shapes import (
        BoolBT,
        FloatBT,
        FloatChunk,
        FloatS,
        IntBT,
        IntChunk,
        IntN,
        Scalar,
    )

__all__ = ["LossConfig", "LossInputs", "expected_grad", "loss_weights_for", "policy_loss"]

Aggregation = Literal["token", "sequence", "constant", "prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The tensors of one microbatch; logprobs and entropies are in nats.

    Example: a row of a prompt of 2 tokens and a completion of 3 has ``loss_mask``
    [[False, False, True, True, True]], ``sequence_ids`` [[-1, -1, 0, 0, 0]], ``advantages`` [0.5]
    and, as the only completion of its update, ``loss_weights`` [1 / 3].

    Attributes:
        logprobs: of the policy in training, with gradient.
        old_logprobs: of the policy before the update; None where these are ``logprobs`` themselves
            (the only update of a batch), or where the ratio is to the sampler.
        sampler_logprobs: of the distribution that the tokens were drawn from; None leaves their
            statistics out.
        ref_logprobs: of the reference policy; None when beta is 0.
        entropies: of the policy, with gradient under an entropy bonus; None leaves their statistics
            out.
        loss_mask: True on trained tokens.
        policy_mask: True on tokens that carry the policy loss when ``top_entropy_frac`` is below 1;
            None when all do.
        sequence_ids: the sequence (completion) of each token; -1 for none.
        advantages: of each sequence.
        loss_weights: of each sequence's tokens, the aggregation's denominator included.
    """

    logprobs: FloatBT
    old_logprobs: FloatBT | None
    sampler_logprobs: FloatBT | None
    ref_logprobs: FloatBT | None
    entropies: FloatBT | None
    loss_mask: BoolBT
    policy_mask: BoolBT | None
    sequence_ids: IntBT
    advantages: FloatS
    loss_weights: FloatS


def policy_loss(inputs: LossInputs, config: LossConfig) -> tuple[Scalar, dict[str, Stat]]:
    """The globally normalised loss, with gradient, and its statistics over trained tokens.

    Without ``sampler_logprobs`` there are no statistics of the sampler, without ``entropies`` no
    ``entropy``, with beta 0 no ``kl``.

    Raises:
        ValueError: an input that the loss reads is missing.
    """
    loss, stats = _loss_and_stats(inputs, config)
    return loss, {name: compute() for name, compute in stats.items()}


def _loss_and_stats(inputs: LossInputs, config: LossConfig) -> tuple[Scalar, StatsLater]:
    mask = inputs.loss_mask.bool()
    sequences = inputs.sequence_ids.clamp(min=0).long()
    # Untrained positions may hold anything, infinities included: 0 * inf is NaN, where() is not.
    logprobs = torch.where(mask, inputs.logprobs, 0.0)
    old = _trained(inputs.old_logprobs, mask)
    old = logprobs.detach() if old is None else old
    sampler = _trained(inputs.sampler_logprobs, mask)
    tokens = LossTokens(
        logprobs=logprobs,
        anchor=_needed(sampler, "sampler_logprobs", "the ratio is to the sampler")
        if config.anchored_at_sampler
        else old,
        advantages=inputs.advantages[sequences],
        mask=mask,
        sequences=sequences,
    )
    losses, stats = token_losses(tokens, config)
    factor, more = _factor(inputs, tokens, old, sampler, config)
    losses, stats = losses * factor, stats | more
    if config.beta:
        ref = _needed(_trained(inputs.ref_logprobs, mask), "ref_logprobs", "beta is not 0")
        kl = _kl(ref - logprobs, config)
        kl = kl * torch.exp(logprobs - tokens.anchor) if config.kl_unbiased else kl
        losses = losses + config.beta * kl
        stats["kl"] = partial(stat, kl, mask)
    if config.entropy_coef:
        bonus = _needed(inputs.entropies, "entropies", "entropy_coef is not 0")
        losses = losses - config.entropy_coef * torch.where(mask, bonus, 0.0)
    if inputs.entropies is not None:
        stats["entropy"] = partial(stat, inputs.entropies, mask)
    return torch.where(mask, losses * inputs.loss_weights[sequences], 0.0).sum(), stats


def _factor(
    inputs: LossInputs,
    tokens: LossTokens,
    old: FloatBT,
    sampler: FloatBT | None,
    config: LossConfig,
) -> tuple[FloatBT, StatsLater]:
    """Sampler correction times masks, without gradient: the factor of each token's policy loss."""
    factor = torch.ones_like(old)
    stats: StatsLater = {}
    if sampler is not None:
        factor, stats = correction(old, sampler, tokens.mask, tokens.sequences, config)
    elif config.correction != "none":
        _needed(sampler, "sampler_logprobs", f"correction is {config.correction}")
    if config.off_policy_threshold is not None:
        sampled = _needed(sampler, "sampler_logprobs", "off_policy_threshold is set")
        kept, more = off_policy_sequences(tokens, sampled, config.off_policy_threshold)
        factor, stats = factor * kept, stats | more
    if config.top_entropy_frac < 1:
        reason = "top_entropy_frac is below 1"
        factor = factor * _needed(inputs.policy_mask, "policy_mask", reason)
    return factor, stats


def _kl(difference: FloatBT, config: LossConfig) -> FloatBT:
    """The estimators of Schulman's "Approximating KL divergence", of ref - policy."""
    if config.kl_estimator == "k2":
        return difference.square() / 2
    return torch.exp(difference) - difference - 1


def _trained(values: FloatBT | None, mask: BoolBT) -> FloatBT | None:
    return None if values is None else torch.where(mask, values.detach(), 0.0)


def _needed(values: Shaped[Tensor, "B T"] | None, name: str, reason: str) -> Shaped[Tensor, "B T"]:
    if values is None:
        raise ValueError(f"{reason}, but {name} is missing")
    return values


def loss_weights_for(
    aggregation: Aggregation,
    lengths: Sequence[int],
    groups: Sequence[int] | None = None,
    max_completion_length: int | None = None,
) -> FloatS:
    """The weight of each sequence's tokens, by aggregation.

    token 1/N, sequence 1/(S L_i), constant 1/(S Lmax), prompt 1/(P N_group), with N loss tokens, S
    sequences, P prompts, L_i a sequence's and N_group a group's loss tokens. A sequence without
    loss tokens counts as a sequence; its weight is 0 where its length would divide. Example: two
    sequences of 1 and 3 loss tokens weigh 1/4 each under ``token``, 1/2 and 1/6 under ``sequence``.

    Args:
        lengths: loss tokens of each sequence of the optimizer update.
        groups: the group of each sequence; needed for ``prompt``.
        max_completion_length: Lmax; needed for ``constant``.

    Raises:
        ValueError: an unknown aggregation, or a missing argument.
    """
    tokens = torch.as_tensor(lengths, dtype=torch.float64)
    count = max(len(tokens), 1)
    if aggregation == "token":
        weights = torch.ones_like(tokens) / tokens.sum().clamp(min=1)
    elif aggregation == "sequence":
        weights = torch.where(tokens > 0, 1 / (count * tokens.clamp(min=1)), 0.0)
    elif aggregation == "constant":
        if not max_completion_length:
            raise ValueError("aggregation 'constant' needs max_completion_length")
        weights = torch.ones_like(tokens) / (count * max_completion_length)
    elif aggregation == "prompt":
        if groups is None or len(groups) != len(tokens):
            raise ValueError("aggregation 'prompt' needs the group of each sequence")
        _, index = torch.unique(torch.as_tensor(groups), return_inverse=True)
        num_groups = int(index.max()) + 1 if len(tokens) else 1
        per_group = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, index, tokens)
        weights = 1 / (num_groups * per_group[index].clamp(min=1))
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}")
    return weights.float()


def is_token_separable(config: LossConfig) -> bool:
    """Whether a token's gradient depends on no other token's logprob.

    A sequence's logprobs act together in gspo's ratio, in corrections by sequence and in the
    off-policy sequence mask.
    """
    return (
        config.loss != "gspo"
        and (config.correction == "none" or config.correction_level == "token")
        and config.off_policy_threshold is None
    )


def expected_grad(
    inputs: LossInputs, rows: IntN, columns: IntN, config: LossConfig
) -> ExpectedGrad | None:
    """The gradient of `policy_loss` by logprob and entropy of tokens, as a function of these two.

    The function serves any of the N tokens at ``rows`` and ``columns``, before the others' logprobs
    are known. None where the loss is not separable by token. ``inputs.logprobs`` and
    ``inputs.entropies`` are not read.
    """
    if not is_token_separable(config):
        return None
    names = ("old_logprobs", "sampler_logprobs", "ref_logprobs", "loss_mask", "policy_mask")
    grids = {name: getattr(inputs, name) for name in (*names, "sequence_ids")}
    flat = {k: None if grid is None else grid[rows, columns] for k, grid in grids.items()}

    @torch.enable_grad()
    def gradient(
        which: slice | IntChunk, logprobs: FloatChunk, entropies: FloatChunk, /
    ) -> tuple[FloatChunk, FloatChunk | None]:
        part: dict[str, Any] = {k: v if v is None else v[None, which] for k, v in flat.items()}
        leaf = logprobs.detach()[None].requires_grad_()
        bonus = entropies.detach()[None].requires_grad_()
        loss, _ = _loss_and_stats(replace(inputs, logprobs=leaf, entropies=bonus, **part), config)
        leaves = (leaf, bonus) if config.entropy_coef else (leaf,)
        by_logprob, *by_entropy = torch.autograd.grad(loss, leaves)
        return by_logprob[0], by_entropy[0][0] if by_entropy else None

    return gradient
