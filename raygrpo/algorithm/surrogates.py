"""The token losses: each turns the ratio of two policies into the loss of a token.

To add a loss, write a function like `_clip` here and a branch in `token_losses`. Its name goes into
`LossName` and its parameters into `LossSection` (config/algorithm.py).
docs/algorithms.md has the formulas, their papers and the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

from raygrpo.config.algorithm import Correction, LossSection
from raygrpo.types import Stat

if TYPE_CHECKING:
    from jaxtyping import Bool, Shaped

    from raygrpo.algorithm.shapes import BoolBT, FloatBT, FloatS, IntBT

# Weight of dppo_tv's pull towards the sampler, (l - mu)^2.
DPPO_PULL = 1e-3

# Statistics by name, computed on request: each one waits for the device.
StatsLater = dict[str, Callable[[], Stat]]


class LossConfig(LossSection):
    """The configuration's ``loss`` section, with the correction that ``auto`` stands for.

    Example: ``LossConfig(loss="clip", clip_high=0.28, beta=0.04)`` is DAPO's clipped loss with a
    KL to the reference. The aggregation over tokens is a weight per sequence (`loss_weights_for`).
    """

    correction: Correction = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """The tokens of a microbatch as a token loss reads them; untrained positions hold 0.

    Attributes:
        logprobs: of the policy, with gradient.
        anchor: the logprobs below the ratio, of the old policy or the sampler; without gradient.
        advantages: of each token's sequence.
        mask: True on trained tokens.
        sequences: the number of each token's sequence, from 0.
    """

    logprobs: FloatBT
    anchor: FloatBT
    advantages: FloatBT
    mask: BoolBT
    sequences: IntBT


def _clip(ratio: FloatBT, tokens: LossTokens, config: LossConfig) -> tuple[FloatBT, StatsLater]:
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


def _cispo(ratio: FloatBT, tokens: LossTokens, config: LossConfig) -> tuple[FloatBT, StatsLater]:
    weight = ratio.detach().clamp(max=config.cispo_cap)
    capped = (ratio > config.cispo_cap) & (tokens.advantages > 0)
    losses = -weight * tokens.advantages * tokens.logprobs
    return losses, {"cispo_clip_ratio": partial(stat, capped.float(), tokens.mask)}


def _sapo(ratio: FloatBT, tokens: LossTokens, config: LossConfig) -> FloatBT:
    positive = tokens.advantages > 0
    tau = torch.full_like(ratio, config.sapo_tau_neg).masked_fill(positive, config.sapo_tau_pos)
    return -tokens.advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def _dppo(log_ratio: FloatBT, tokens: LossTokens, config: LossConfig) -> tuple[FloatBT, StatsLater]:
    moved = tokens.logprobs.detach().exp() - tokens.anchor.exp()
    positive = tokens.advantages > 0
    high = positive & (moved > config.dppo_tv)
    low = ~positive & (moved < -config.dppo_tv)
    kept = torch.where(high | low, 0.0, tokens.advantages)
    losses = -kept * log_ratio.exp() + DPPO_PULL * log_ratio.square()
    return losses, _clip_stats(low, high, tokens, by_sequence=False)


def token_losses(tokens: LossTokens, config: LossConfig) -> tuple[FloatBT, StatsLater]:
    """The policy loss of each token before corrections, KL and weights; and its statistics."""
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
    elif config.loss == "gspo":
        # One ratio per sequence: the geometric mean over its tokens, not over its row's.
        means, _ = sequence_means(log_ratio, tokens.mask, tokens.sequences)
        losses, more = _clip(means[tokens.sequences].exp(), tokens, config)
    elif config.loss == "clip":
        losses, more = _clip(log_ratio.exp(), tokens, config)
    else:
        assert_never(config.loss)
    return losses, stats | more


def _clip_stats(low: BoolBT, high: BoolBT, tokens: LossTokens, *, by_sequence: bool) -> StatsLater:
    """Shares of tokens (gspo: of sequences) whose ratio passed a bound that acts on them."""
    mask, sequences = tokens.mask, tokens.sequences
    lower, upper = low.float(), high.float()

    def share(values: FloatBT) -> Callable[[], Stat]:
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


def sequence_means(values: FloatBT, mask: BoolBT, sequences: IntBT) -> tuple[FloatS, FloatS]:
    """The mean over each sequence's trained tokens, with gradient, and their number.

    A sequence is a completion, wherever its tokens lie: several may share a row. ``values`` must
    be finite where ``mask`` is False; ``sequences`` count from 0.
    """
    size = int(sequences.max()) + 1 if sequences.numel() else 0
    flat, index = (values * mask).flatten(), sequences.flatten()
    sums = torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, flat)
    ones = mask.to(values.dtype).flatten()
    counts = torch.zeros_like(sums).index_add(0, index, ones)
    return sums / counts.clamp(min=1), counts


def stat(values: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Stat:
    """Sum, count, smallest and largest of the values where ``mask`` is True."""
    chosen = values.detach()[mask].double()
    if not chosen.numel():
        return Stat(sum=0.0, count=0.0, min=float("inf"), max=float("-inf"))
    low, high = torch.aminmax(chosen)
    total, least, most = torch.stack([chosen.sum(), low, high]).tolist()
    return Stat(sum=total, count=float(chosen.numel()), min=least, max=most)


def sequence_stat(values: FloatBT, mask: BoolBT, sequences: IntBT) -> Stat:
    """A statistic of the sequences' means; sequences without trained tokens are left out."""
    means, counts = sequence_means(values.detach(), mask, sequences)
    return stat(means, counts > 0)
