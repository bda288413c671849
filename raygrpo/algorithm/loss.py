"""Policy losses: one pure function from per-token logprobs to a globally normalised loss.

The denominator of the aggregation is global over one optimizer update and arrives as a weight per
sequence (`loss_weights_for`), so the loss of an update is the plain sum of `policy_loss` over its
microbatches and ranks, whatever the split. docs/algorithms.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from raygrpo.algorithm.corrections import correction, off_policy_sequences
from raygrpo.algorithm.entropy import entropy_threshold, top_entropy_mask
from raygrpo.algorithm.loss_inputs import Aggregation, LossConfig, LossInputs
from raygrpo.algorithm.stats import StatsLater, stat
from raygrpo.algorithm.surrogates import Tokens, token_losses
from raygrpo.types import Stat

__all__ = ["Aggregation", "LossConfig", "LossInputs", "loss_weights_for", "policy_loss"]


def loss_weights_for(
    aggregation: Aggregation,
    lengths: Sequence[int],
    groups: Sequence[int] | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """The weight [S] of each sequence's tokens, by aggregation.

    token 1/N, sequence 1/(S L_i), constant 1/(S Lmax), prompt 1/(P N_group), with N loss tokens, S
    sequences, P prompts, L_i a sequence's and N_group a group's loss tokens. A sequence without
    loss tokens counts as a sequence and weighs 0 where its length would divide.

    Args:
        lengths: loss tokens of each sequence of the optimizer update.
        groups: the group of each sequence; needed for ``prompt``.
        max_completion_length: needed for ``constant``.

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


def policy_loss(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Stat]]:
    """The globally normalised loss (a scalar with gradient) and its statistics.

    Statistics are over trained tokens; those of the sampler are left out without
    ``sampler_logprobs``, ``entropy`` without ``entropies``, ``kl`` when beta is 0.

    Raises:
        ValueError: logprobs or entropies that the loss reads are missing.
    """
    loss, stats = loss_and_stats(inputs, config)
    return loss, {name: compute() for name, compute in stats.items()}


def loss_and_stats(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, StatsLater]:
    """`policy_loss` whose statistics are computed when they are asked for."""
    mask = inputs.loss_mask.bool()
    sequences = inputs.sequence_ids.clamp(min=0).long()
    weights = _per_token(_weights(inputs, mask, config), sequences)
    # Untrained positions may hold anything, infinities included: 0 * inf is NaN, where() is not.
    logprobs = torch.where(mask, inputs.logprobs, 0.0)
    old = _trained(inputs.old_logprobs, mask)
    old = logprobs.detach() if old is None else old
    sampler = _trained(inputs.sampler_logprobs, mask)
    tokens = Tokens(
        logprobs=logprobs,
        anchor=_needed(sampler, "sampler_logprobs", "the ratio is to the sampler")
        if config.anchored_at_sampler
        else old,
        advantages=_per_token(inputs.advantages, sequences),
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
    return torch.where(mask, losses * weights, 0.0).sum(), stats


def _factor(
    inputs: LossInputs, tokens: Tokens, old: Tensor, sampler: Tensor | None, config: LossConfig
) -> tuple[Tensor, StatsLater]:
    """What multiplies each token's policy loss: sampler correction and masks, without gradient."""
    mask, sequences = tokens.mask, tokens.sequences
    factor = torch.ones_like(old)
    stats: StatsLater = {}
    if sampler is not None:
        factor, stats = correction(old, sampler, mask, sequences, config)
    elif config.correction != "none":
        _needed(sampler, "sampler_logprobs", f"correction is {config.correction}")
    if config.off_policy_threshold is not None:
        sampled = _needed(sampler, "sampler_logprobs", "off_policy_threshold is set")
        kept, more = off_policy_sequences(
            tokens.logprobs.detach(),
            sampled,
            tokens.advantages,
            mask,
            sequences,
            config.off_policy_threshold,
        )
        factor, stats = factor * kept, stats | more
    if config.top_entropy_frac < 1:
        factor = factor * _policy_mask(inputs, mask, config)
    return factor, stats


def _policy_mask(inputs: LossInputs, mask: Tensor, config: LossConfig) -> Tensor:
    if inputs.policy_mask is not None:
        return inputs.policy_mask
    entropies = _needed(inputs.entropies, "entropies", "top_entropy_frac is below 1")
    threshold = entropy_threshold(entropies[mask], config.top_entropy_frac)
    return top_entropy_mask(entropies, mask, threshold)


def _kl(difference: Tensor, config: LossConfig) -> Tensor:
    """The estimator of Schulman's "Approximating KL divergence", of ref - policy."""
    if config.kl_estimator == "k2":
        return difference.square() / 2
    return torch.exp(difference) - difference - 1


def _weights(inputs: LossInputs, mask: Tensor, config: LossConfig) -> Tensor:
    if inputs.loss_weights is not None:
        return inputs.loss_weights
    ids = inputs.sequence_ids
    size = int(ids.max()) + 1
    lengths = torch.bincount(ids[mask].long(), minlength=size)
    weights = loss_weights_for(
        config.aggregation, lengths.tolist(), None, config.max_completion_length
    )
    return weights.to(inputs.logprobs.device)


def _trained(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else torch.where(mask, values.detach(), 0.0)


def _needed(values: Tensor | None, name: str, reason: str) -> Tensor:
    if values is None:
        raise ValueError(f"{reason}, but {name} is missing")
    return values


def _per_token(values: Tensor, sequences: Tensor) -> Tensor:
    return values if values.ndim == sequences.ndim else values[sequences]
