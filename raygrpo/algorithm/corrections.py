"""The gap between sampler and policy: its size, and the factors that correct for it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from raygrpo.algorithm.surrogates import (
    LossConfig,
    LossTokens,
    StatsLater,
    sequence_means,
    sequence_stat,
    stat,
)

if TYPE_CHECKING:
    from raygrpo.algorithm.shapes import BoolBT, FloatBT, IntBT


@torch.no_grad()
def correction(
    old: FloatBT, sampler: FloatBT, mask: BoolBT, sequences: IntBT, config: LossConfig
) -> tuple[FloatBT, StatsLater]:
    """The factor for the gap between sampler and old policy, without gradient; and statistics.

    rho = exp(old - sampler), of a token, or of a sequence as the geometric mean of its tokens (a
    product explodes with length). ``tis``: min(rho, correction_max), FlashRL's truncated importance
    sampling; ``icepop`` (2510.18855): rho within [correction_min, correction_max], else 0.
    """
    token_gap = old.detach() - sampler
    by_sequence = config.correction_level == "sequence"
    gap = token_gap
    if by_sequence:
        gap = sequence_means(token_gap, mask, sequences)[0][sequences]
    applied = rho = torch.exp(gap)
    if config.correction == "tis":
        applied = rho.clamp(max=config.correction_max)
    elif config.correction == "icepop":
        inside = (rho >= config.correction_min) & (rho <= config.correction_max)
        applied = torch.where(inside, rho, 0.0)
    factor = torch.ones_like(rho) if config.correction == "none" else applied
    token_rho = torch.exp(token_gap)
    stats: StatsLater = {
        "sampling/sampling_logp_difference": partial(stat, token_gap.abs(), mask),
        # As in TRL: the ratio after the correction, once per sequence at sequence level.
        "sampling/importance_sampling_ratio": partial(sequence_stat, applied, mask, sequences)
        if by_sequence
        else partial(stat, applied, mask),
        # The metric `ess` is computed from these two.
        "sampling/token_ratio": partial(stat, token_rho, mask),
        "sampling/token_ratio_squared": partial(stat, token_rho.square(), mask),
        # E_mu[rho - 1 - log rho] = KL(mu || pi_old), never negative.
        "sampling/kl": partial(stat, token_rho - 1 - token_gap, mask),
    }
    return factor, stats


@torch.no_grad()
def off_policy_sequences(
    tokens: LossTokens, sampler: FloatBT, threshold: float
) -> tuple[BoolBT, StatsLater]:
    """The tokens that the off-policy sequence mask of DeepSeek-V3.2 (2512.02556) keeps.

    The mask drops a sequence of negative advantage whose mean of (sampler - policy) is above
    ``threshold`` (nats): the policy has already moved away from such a sequence.
    """
    mask, sequences = tokens.mask, tokens.sequences
    means, _ = sequence_means(sampler - tokens.logprobs.detach(), mask, sequences)
    dropped = (tokens.advantages < 0) & (means[sequences] > threshold)
    return ~dropped, {"off_policy_frac": partial(sequence_stat, dropped.float(), mask, sequences)}
