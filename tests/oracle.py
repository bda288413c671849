"""GRPO's formulas in plain Python floats, token by token, sharing no code with the project."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Sequence_:
    """One completion: per-token values, and its advantage and group."""

    new: list[float]
    old: list[float]
    sampler: list[float]
    ref: list[float]
    mask: list[bool]
    advantage: float
    group: int = 0
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = sum(self.mask)


def advantages(rewards: Sequence[float | None], baseline: str, scale: str) -> list[float]:
    """Advantages of one group, by hand (not the batch scales)."""
    scored = [r for r in rewards if r is not None]
    if len(scored) < 2:
        return [0.0] * len(rewards)
    n, mean = len(scored), sum(scored) / len(scored)
    result = []
    for reward in rewards:
        if reward is None:
            result.append(0.0)
            continue
        if baseline == "mean":
            value = reward - mean
        elif baseline == "leave_one_out":
            value = reward - (sum(scored) - reward) / (n - 1)
        else:
            value = (reward - mean) / mean if mean > 0 else 0.0
        squares = sum((r - mean) ** 2 for r in scored)
        if scale == "group":
            value /= math.sqrt(squares / (n - 1)) + 1e-4
        elif scale == "group_population":
            value /= math.sqrt(squares / n) + 1e-8
        result.append(value)
    return result


def clip_token(
    ratio: float, advantage: float, low: float, high: float, delta: float | None, dual: float | None
) -> float:
    """PPO's clipped loss of one token, with the upper bound `delta` and the dual clip."""
    bounded = max(1 - low, min(1 + high, ratio))
    free = ratio if delta is None else min(ratio, delta)
    objective = min(free * advantage, bounded * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


def kl_token(new: float, ref: float, estimator: str) -> float:
    """k2 = d^2 / 2 and k3 = exp(d) - d - 1 with d = ref - new."""
    d = ref - new
    return d * d / 2 if estimator == "k2" else math.exp(d) - d - 1


def correction_token(
    seq: Sequence_, t: int, kind: str, level: str, low: float, high: float
) -> float:
    """Sampler correction: tis caps the ratio, icepop zeroes it outside its band."""
    if kind == "none":
        return 1.0
    gap = seq.old[t] - seq.sampler[t]
    if level == "sequence":
        gaps = [o - s for o, s, m in zip(seq.old, seq.sampler, seq.mask, strict=True) if m]
        gap = sum(gaps) / len(gaps)
    rho = math.exp(gap)
    if kind == "tis":
        return min(rho, high)
    return rho if low <= rho <= high else 0.0


def loss(
    sequences: Sequence[Sequence_],
    *,
    aggregation: str,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    delta: float | None = None,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_unbiased: bool = False,
    max_completion_length: int = 0,
    correction: str = "none",
    correction_level: str = "token",
    correction_min: float = 0.5,
    correction_max: float = 2.0,
) -> float:
    """The loss of one optimizer update."""
    totals: list[float] = []
    for seq in sequences:
        total = 0.0
        for t, trained in enumerate(seq.mask):
            if not trained:
                continue
            ratio = math.exp(seq.new[t] - seq.old[t])
            value = clip_token(ratio, seq.advantage, clip_low, clip_high, delta, dual_clip)
            value *= correction_token(
                seq, t, correction, correction_level, correction_min, correction_max
            )
            if beta:
                kl = kl_token(seq.new[t], seq.ref[t], kl_estimator)
                value += beta * kl * (ratio if kl_unbiased else 1.0)
            total += value
        totals.append(total)
    lengths = [seq.length for seq in sequences]
    if aggregation == "token":
        return sum(totals) / sum(lengths)
    if aggregation == "sequence":
        parts = [total / n if n else 0.0 for total, n in zip(totals, lengths, strict=True)]
        return sum(parts) / len(parts)
    if aggregation == "constant":
        return sum(totals) / (len(totals) * max_completion_length)
    groups = sorted({seq.group for seq in sequences})
    means = []
    for group in groups:
        members = [i for i, seq in enumerate(sequences) if seq.group == group]
        count = sum(lengths[i] for i in members)
        means.append(sum(totals[i] for i in members) / count if count else 0.0)
    return sum(means) / len(groups)
