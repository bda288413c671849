"""Policy losses: one pure function from per-token logprobs to a globally normalised loss.

The denominator of the aggregation is global over one optimizer update and arrives as a weight per
sequence (`loss_weights_for`), so the loss of an update is the plain sum of `policy_loss` over its
microbatches and ranks, whatever the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raygrpo.types import Stat

Aggregation = Literal["token", "sequence", "constant", "prompt"]

_KNOWN = {
    "loss": ("clip",),
    "kl_estimator": ("k2", "k3"),
    "aggregation": ("token", "sequence", "constant", "prompt"),
    "correction": ("none", "tis", "icepop"),
    "correction_level": ("token", "sequence"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """What is minimised; the names are those of the configuration's ``loss`` section.

    ``max_completion_length`` (tokens) is the denominator of the ``constant`` aggregation.

    Raises:
        ValueError: an unknown name, or the estimator k1, which teaches nothing as a loss.
    """

    loss: Literal["clip"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: Literal["k2", "k3"] = "k3"
    kl_unbiased: bool = False
    aggregation: Aggregation = "token"
    max_completion_length: int | None = None
    correction: Literal["none", "tis", "icepop"] = "none"
    correction_level: Literal["token", "sequence"] = "token"
    correction_min: float = 0.5
    correction_max: float = 2.0

    def __post_init__(self) -> None:
        estimator: str = self.kl_estimator
        if estimator == "k1":
            raise ValueError("k1 in the loss has a gradient of zero on average; use k2 or k3")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Per-token inputs [B, T]; advantages and loss_weights are [B, T], or [S] by sequence id.

    Attributes:
        logprobs: of the policy in training, with gradient; nats.
        old_logprobs: of the policy before the update; None where that is ``logprobs`` itself (the
            only update of its batch).
        sampler_logprobs: of the distribution the tokens were drawn from; None skips what needs it.
        ref_logprobs: of the reference policy; None when beta is 0.
        entropies: of the policy, for statistics; None leaves them out.
        loss_mask: True on trained tokens.
        advantages: the advantage of a token's sequence.
        sequence_ids: [B, T] int, the sequence (completion) of each token; -1 for none.
        loss_weights: the weight of each token's loss, denominator included. None computes it from
            this batch alone, taken as the whole update.
    """

    logprobs: Tensor
    old_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropies: Tensor | None
    loss_mask: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    loss_weights: Tensor | None


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
        ValueError: a reference is missing although beta is not 0.
    """
    mask = inputs.loss_mask.bool()
    sequences = inputs.sequence_ids.clamp(min=0).long()
    advantages = _per_token(inputs.advantages, sequences)
    weights = _per_token(_weights(inputs, mask, config), sequences)
    # Untrained positions may hold anything, infinities included: 0 * inf is NaN, where() is not.
    logprobs = torch.where(mask, inputs.logprobs, 0.0)
    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    old = torch.where(mask, old, 0.0)

    ratio = torch.exp(logprobs - old)
    losses, clipped_low, clipped_high = _clip(ratio, advantages, config)
    stats = {
        "clip_ratio/low_mean": _stat(clipped_low.float(), mask),
        "clip_ratio/low_min": _sequence_stat(clipped_low.float(), mask, sequences),
        "clip_ratio/high_mean": _stat(clipped_high.float(), mask),
        "clip_ratio/high_max": _sequence_stat(clipped_high.float(), mask, sequences),
        "clip_ratio/region_mean": _stat((clipped_low | clipped_high).float(), mask),
        "ratio": _stat(ratio, mask),
    }
    if inputs.sampler_logprobs is not None:
        sampler = torch.where(mask, inputs.sampler_logprobs, 0.0)
        factor, sampler_stats = _correction(old, sampler, mask, sequences, config)
        losses = losses * factor
        stats |= sampler_stats
    if config.beta:
        if inputs.ref_logprobs is None:
            raise ValueError("beta is not 0, but ref_logprobs is missing")
        kl = _kl(logprobs, torch.where(mask, inputs.ref_logprobs, 0.0), config)
        kl = kl * ratio if config.kl_unbiased else kl
        losses = losses + config.beta * kl
        stats["kl"] = _stat(kl, mask)
    if inputs.entropies is not None:
        stats["entropy"] = _stat(inputs.entropies, mask)
    loss = torch.where(mask, losses * weights, 0.0).sum()
    return loss, stats


def _clip(ratio: Tensor, advantages: Tensor, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate per token, and where its lower and upper bound act."""
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    free = ratio if config.delta is None else ratio.clamp(max=config.delta)
    objective = torch.minimum(free * advantages, bounded * advantages)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
    low = (ratio < 1 - config.clip_low) & (advantages < 0)
    high = (ratio > 1 + config.clip_high) & (advantages > 0)
    return -objective, low, high


def _kl(logprobs: Tensor, ref: Tensor, config: LossConfig) -> Tensor:
    difference = ref - logprobs
    if config.kl_estimator == "k2":
        return difference.square() / 2
    return torch.exp(difference) - difference - 1


def _correction(
    old: Tensor, sampler: Tensor, mask: Tensor, sequences: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Stat]]:
    """The factor for the gap between sampler and learner (detached), and what the gap is.

    ``sequence`` takes the geometric mean over a sequence: a product of token ratios explodes with
    length.
    """
    with torch.no_grad():
        gap = old.detach() - sampler
        if config.correction_level == "sequence":
            gap = _sequence_means(gap, mask, sequences)[0][sequences]
        rho = torch.exp(gap)
        if config.correction == "tis":
            factor = rho.clamp(max=config.correction_max)
        elif config.correction == "icepop":
            inside = (rho >= config.correction_min) & (rho <= config.correction_max)
            factor = torch.where(inside, rho, 0.0)
        else:
            factor = torch.ones_like(rho)
        applied = rho if config.correction == "none" else factor
        by_sequence = config.correction_level == "sequence"
        token_gap = old.detach() - sampler
        token_rho = torch.exp(token_gap)
        stats = {
            "sampling/sampling_logp_difference": _stat(token_gap.abs(), mask),
            # As TRL's: what the correction left of the ratio, once a sequence at sequence level.
            "sampling/importance_sampling_ratio": _sequence_stat(applied, mask, sequences)
            if by_sequence
            else _stat(applied, mask),
            # Of these two `ess` is made.
            "sampling/token_ratio": _stat(token_rho, mask),
            "sampling/token_ratio_squared": _stat(token_rho.square(), mask),
            # E_mu[rho - 1 - log rho] = KL(mu || pi_old), never negative.
            "sampling/kl": _stat(token_rho - 1 - token_gap, mask),
        }
    return factor, stats


def _sequence_means(values: Tensor, mask: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Means over each sequence's trained tokens [S], and their numbers [S]."""
    size = int(sequences.max()) + 1
    flat, index = (values * mask).flatten(), sequences.flatten()
    sums = torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, index, flat)
    ones = mask.to(values.dtype).flatten()
    counts = torch.zeros_like(sums).index_add_(0, index, ones)
    return sums / counts.clamp(min=1), counts


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


def _per_token(values: Tensor, sequences: Tensor) -> Tensor:
    return values if values.ndim == sequences.ndim else values[sequences]


def _sequence_stat(values: Tensor, mask: Tensor, sequences: Tensor) -> Stat:
    """A statistic of the sequences' means; sequences without trained tokens are in none."""
    means, counts = _sequence_means(values.detach(), mask, sequences)
    return _stat(means, counts > 0)


def _stat(values: Tensor, mask: Tensor) -> Stat:
    chosen = values.detach()[mask].double()
    if not chosen.numel():
        return Stat(sum=0.0, count=0.0, min=float("inf"), max=float("-inf"))
    low, high = torch.aminmax(chosen)
    total, least, most = torch.stack([chosen.sum(), low, high]).tolist()
    return Stat(sum=total, count=float(chosen.numel()), min=least, max=most)
