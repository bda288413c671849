"""The token losses: what each does with the ratio of two policies. docs/algorithms.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from raygrpo.algorithm.loss_inputs import LossConfig
from raygrpo.algorithm.stats import StatsLater, sequence_means, sequence_stat, stat
from raygrpo.types import Stat

# Weight of dppo_tv's pull towards the sampler, (l - mu)^2.
DPPO_PULL = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A batch as a token loss reads it, [B, T]; untrained positions hold 0.

    ``logprobs`` have a gradient; ``anchor`` are those that the ratio is to, without one.
    """

    logprobs: Tensor
    anchor: Tensor
    advantages: Tensor
    mask: Tensor
    sequences: Tensor


def token_losses(tokens: Tokens, config: LossConfig) -> tuple[Tensor, StatsLater]:
    """The policy loss of each token [B, T], before corrections, KL and weights; and statistics."""
    log_ratio = tokens.logprobs - tokens.anchor
    stats: StatsLater = {"ratio": partial(stat, log_ratio.exp(), tokens.mask)}
    if config.loss == "reinforce":
        return -tokens.advantages * tokens.logprobs, stats
    if config.loss == "cispo":
        losses, more = _cispo(log_ratio.exp(), tokens, config)
    elif config.loss == "sapo":
        losses, more = _sapo(log_ratio.exp(), tokens, config), {}
    elif config.loss == "dppo_tv":
        losses, more = _dppo(log_ratio, tokens, config)
    else:
        if config.loss == "gspo":
            # One ratio a sequence: a geometric mean over its tokens, not over its row's.
            means, _ = sequence_means(log_ratio, tokens.mask, tokens.sequences)
            log_ratio = means[tokens.sequences]
        losses, more = _clip(log_ratio.exp(), tokens, config)
    return losses, stats | more


def _clip(ratio: Tensor, tokens: Tokens, config: LossConfig) -> tuple[Tensor, StatsLater]:
    advantages = tokens.advantages
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    free = ratio if config.delta is None else ratio.clamp(max=config.delta)
    objective = torch.minimum(free * advantages, bounded * advantages)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
    low = (ratio < 1 - config.clip_low) & (advantages < 0)
    high = (ratio > 1 + config.clip_high) & (advantages > 0)
    return -objective, _clip_stats(low, high, tokens, by_sequence=config.loss == "gspo")


def _cispo(ratio: Tensor, tokens: Tokens, config: LossConfig) -> tuple[Tensor, StatsLater]:
    weight = ratio.detach().clamp(max=config.cispo_cap)
    capped = (ratio > config.cispo_cap) & (tokens.advantages > 0)
    losses = -weight * tokens.advantages * tokens.logprobs
    return losses, {"cispo_clip_ratio": partial(stat, capped.float(), tokens.mask)}


def _sapo(ratio: Tensor, tokens: Tokens, config: LossConfig) -> Tensor:
    positive = tokens.advantages > 0
    tau = torch.full_like(ratio, config.sapo_tau_neg).masked_fill(positive, config.sapo_tau_pos)
    return -tokens.advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def _dppo(log_ratio: Tensor, tokens: Tokens, config: LossConfig) -> tuple[Tensor, StatsLater]:
    moved = tokens.logprobs.detach().exp() - tokens.anchor.exp()
    positive = tokens.advantages > 0
    high = positive & (moved > config.dppo_tv)
    low = ~positive & (moved < -config.dppo_tv)
    kept = torch.where(high | low, 0.0, tokens.advantages)
    losses = -kept * log_ratio.exp() + DPPO_PULL * log_ratio.square()
    return losses, _clip_stats(low, high, tokens, by_sequence=False)


def _clip_stats(low: Tensor, high: Tensor, tokens: Tokens, *, by_sequence: bool) -> StatsLater:
    """Shares of tokens (gspo: of sequences) whose ratio passed a bound that acts on them."""
    mask, sequences = tokens.mask, tokens.sequences
    lower, upper = low.float(), high.float()

    def share(values: Tensor) -> Callable[[], Stat]:
        if by_sequence:
            return partial(sequence_stat, values, mask, sequences)
        return partial(stat, values, mask)

    return {
        "clip_ratio/low_mean": share(lower),
        "clip_ratio/low_min": partial(sequence_stat, lower, mask, sequences),
        "clip_ratio/high_mean": share(upper),
        "clip_ratio/high_max": partial(sequence_stat, upper, mask, sequences),
        "clip_ratio/region_mean": share(lower + upper),
    }
