"""Group-relative advantages. Each combination of ``baseline`` and ``scale`` is one convention.

For rewards [1, 0, 0, 1]: mean/group +-0.8659 (DeepSeekMath 2402.03300 as TRL computes it),
mean/group_population +-1.0, mean/none +-0.5 (Dr.GRPO 2503.20783), leave_one_out/none +-0.6667
(RLOO 2402.14740), max_rl/none +-1.0 (MaxRL 2602.02710).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from raygrpo.algorithm.shapes import BoolNG, FloatNG

Baseline = Literal["mean", "leave_one_out", "max_rl"]
Scale = Literal["none", "group", "group_population", "batch", "batch_centred"]

SIGNAL_THRESHOLD = 1e-8
_EPSILON = 1e-4
_POPULATION_EPSILON = 1e-8


def group_advantages(
    rewards_NG: FloatNG | Sequence[Sequence[float]], *, baseline: Baseline, scale: Scale
) -> FloatNG:
    """Advantages of N groups of G rewards; computed in float64, returned in float32.

    NaN is the reward of a completion without a score. Such a completion is in no mean and no
    deviation, and its advantage is 0. A group with fewer than two scores has advantages of 0.

    Args:
        rewards_NG: of all N groups of one StepBatch, which the scales ``batch*`` are over.
        baseline: ``mean`` subtracts the group's mean, ``leave_one_out`` the mean of the others;
            ``max_rl`` divides the centred reward by the mean (0 where the mean is not positive).
        scale: the divisor: ``group`` the group's standard deviation (ddof 1) + 1e-4,
            ``group_population`` the same with ddof 0 and + 1e-8, ``batch`` the deviation of all
            rewards (ddof 1) + 1e-4, ``batch_centred`` that of all centred rewards (ddof 1) + 1e-4.

    Raises:
        ValueError: an unknown name, or rewards that are not two-dimensional or are infinite.
    """
    rewards = torch.as_tensor(rewards_NG, dtype=torch.float64)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [N, G], not {tuple(rewards.shape)}")
    if torch.isinf(rewards).any():
        raise ValueError("a reward is infinite")
    scored = ~torch.isnan(rewards)
    usable = scored & (scored.sum(1, keepdim=True) >= 2)
    values = rewards.nan_to_num(0.0)
    centred = torch.where(usable, _centre(values, scored, baseline), 0.0)
    divisor = _divisor(values, centred, scored, usable, scale)
    return torch.where(usable, centred / divisor, 0.0).float()


def normalised_sum(
    parts_NGK: Float[Tensor, "N G K"] | Sequence[Sequence[Sequence[float]]],
    weights_K: Sequence[float],
) -> FloatNG:
    """Weighted sums of K rewards, each normalised within its group first (GDPO); in float64.

    z_k = (R_k - mean_k) / (std_k + 1e-4), ddof 1. A part that is NaN adds nothing. The sum is NaN
    for a completion without any part, and for all completions of a group with fewer than two
    scored ones.

    Raises:
        ValueError: the parts are not [N, G, K] with K weights, or one is infinite.
    """
    parts = torch.as_tensor(parts_NGK, dtype=torch.float64)
    weights = torch.as_tensor(weights_K, dtype=torch.float64)
    if parts.ndim != 3 or weights.shape != parts.shape[2:]:
        raise ValueError(f"parts must be [N, G, {len(weights)}], not {tuple(parts.shape)}")
    if torch.isinf(parts).any():
        raise ValueError("a reward is infinite")
    there = ~torch.isnan(parts)
    values = parts.nan_to_num(0.0)
    mean = values.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    normalised = (values - mean) / (_deviation(values, there, dim=1, ddof=1) + _EPSILON)
    sums = (torch.where(there, normalised, 0.0) * weights).sum(2)
    scored = there.any(2)
    usable = scored & (scored.sum(1, keepdim=True) >= 2)
    return torch.where(usable, sums, math.nan)


def batch_normalised(sums_NG: FloatNG) -> FloatNG:
    """Advantages from `normalised_sum`: (x - mean) / (std + 1e-4) over all, ddof 1; float32.

    NaN is in neither mean nor deviation, and its advantage is 0.
    """
    there = ~torch.isnan(sums_NG)
    values = sums_NG.nan_to_num(0.0)
    mean = values.sum() / there.sum().clamp(min=1)
    deviation = _deviation(values, there, dim=None, ddof=1)
    return torch.where(there, (values - mean) / (deviation + _EPSILON), 0.0).float()


def has_signal(
    rewards: Sequence[float | None], trained: Sequence[bool], baseline: Baseline = "mean"
) -> bool:
    """Whether a group has signal: a trained completion off the mean by more than 1e-8.

    Args:
        rewards: of each completion; None without a score.
        trained: whether each completion has a token in the loss.
        baseline: under ``max_rl`` the mean must be positive too, since all advantages are 0 else.
    """
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        return False
    mean = sum(scored) / len(scored)
    if baseline == "max_rl" and mean <= 0:
        return False
    return any(
        reward is not None and is_trained and abs(reward - mean) > SIGNAL_THRESHOLD
        for reward, is_trained in zip(rewards, trained, strict=True)
    )


def _centre(values: FloatNG, scored: BoolNG, baseline: Baseline) -> FloatNG:
    count = scored.sum(1, keepdim=True).clamp(min=1)
    mean = (values * scored).sum(1, keepdim=True) / count
    if baseline == "mean":
        return values - mean
    if baseline == "leave_one_out":
        # R - (sum - R) / (n - 1) = (R - mean) * n / (n - 1)
        return (values - mean) * count / (count - 1).clamp(min=1)
    if baseline == "max_rl":
        return torch.where(mean > 0, (values - mean) / mean.clamp(min=1e-300), 0.0)
    raise ValueError(f"unknown baseline {baseline!r}")


def _divisor(
    values: FloatNG, centred: FloatNG, scored: BoolNG, usable: BoolNG, scale: Scale
) -> Float[Tensor, "*groups"]:
    if scale == "none":
        return torch.ones(())
    if scale == "group":
        return _deviation(values, scored, dim=1, ddof=1) + _EPSILON
    if scale == "group_population":
        return _deviation(values, scored, dim=1, ddof=0) + _POPULATION_EPSILON
    if scale == "batch":
        return _deviation(values, scored, dim=None, ddof=1) + _EPSILON
    if scale == "batch_centred":
        return _deviation(centred, usable, dim=None, ddof=1) + _EPSILON
    raise ValueError(f"unknown scale {scale!r}")


def _deviation(
    values: Float[Tensor, "N G *K"], mask: Bool[Tensor, "N G *K"], *, dim: int | None, ddof: int
) -> Float[Tensor, "*groups"]:
    """The standard deviation where ``mask`` is True, over ``dim`` or over all groups (None)."""
    axes = (0, 1) if dim is None else (dim,)
    count = mask.sum(axes, keepdim=True)
    mean = (values * mask).sum(axes, keepdim=True) / count.clamp(min=1)
    squares = ((values - mean).square() * mask).sum(axes, keepdim=True)
    return (squares / (count - ddof).clamp(min=1)).sqrt()
