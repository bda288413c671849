"""What is done about the gap between the sampler and the policy, and how large it is."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from raygrpo.algorithm.loss_inputs import LossConfig
from raygrpo.algorithm.stats import StatsLater, sequence_means, sequence_stat, stat


@torch.no_grad()
def correction(
    old: Tensor, sampler: Tensor, mask: Tensor, sequences: Tensor, config: LossConfig
) -> tuple[Tensor, StatsLater]:
    """The factor [B, T] for the gap between sampler and old policy (detached), and its statistics.

    rho = exp(old - sampler), of a token, or of a sequence as the geometric mean of its tokens' (a
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
        # As TRL's: what the correction left of the ratio, once a sequence at sequence level.
        "sampling/importance_sampling_ratio": partial(sequence_stat, applied, mask, sequences)
        if by_sequence
        else partial(stat, applied, mask),
        # Of these two `ess` is made.
        "sampling/token_ratio": partial(stat, token_rho, mask),
        "sampling/token_ratio_squared": partial(stat, token_rho.square(), mask),
        # E_mu[rho - 1 - log rho] = KL(mu || pi_old), never negative.
        "sampling/kl": partial(stat, token_rho - 1 - token_gap, mask),
    }
    return factor, stats


@torch.no_grad()
def off_policy_sequences(
    logprobs: Tensor,
    sampler: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sequences: Tensor,
    threshold: float,
) -> tuple[Tensor, StatsLater]:
    """Where [B, T] the off-policy sequence mask of DeepSeek-V3.2 (2512.02556) keeps the loss.

    It drops a sequence of negative advantage whose mean of (sampler - policy) is over ``threshold``
    (nats): the policy has left it behind already.
    """
    means, _ = sequence_means(sampler - logprobs, mask, sequences)
    dropped = (advantages < 0) & (means[sequences] > threshold)
    return ~dropped, {"off_policy_frac": partial(sequence_stat, dropped.float(), mask, sequences)}
