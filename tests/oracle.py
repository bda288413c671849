"""GRPO's formulas in plain Python floats, token by token, sharing no code with the project."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sequence_:
    """One completion: per-token values, and its advantage and group.

    ``still`` and ``still_entropy`` are what stop-gradients hold on to: they keep their values while
    a test moves ``new`` and ``entropy`` to differentiate by them.
    """

    new: list[float]
    old: list[float]
    sampler: list[float]
    ref: list[float]
    entropy: list[float]
    mask: list[bool]
    advantage: float
    group: int = 0
    length: int = field(init=False)
    still: list[float] = field(init=False)
    still_entropy: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.length = sum(self.mask)
        self.still, self.still_entropy = list(self.new), list(self.entropy)

    def mean(self, values: list[float]) -> float:
        """Over the trained tokens."""
        chosen = [v for v, trained in zip(values, self.mask, strict=True) if trained]
        return sum(chosen) / len(chosen)


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


@dataclass(frozen=True)
class Options:
    """The names of the project's ``loss`` section."""

    aggregation: str
    loss: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    delta: float | None = None
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    dppo_tv: float = 0.2
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_unbiased: bool = False
    max_completion_length: int = 0
    ratio_anchor: str = "old"
    correction: str = "none"
    correction_level: str = "token"
    correction_min: float = 0.5
    correction_max: float = 2.0
    off_policy_threshold: float | None = None
    top_entropy_frac: float = 1.0
    entropy_coef: float = 0.0


def policy_token(seq: Sequence_, t: int, o: Options) -> float:
    """The policy loss of one token."""
    advantage, new, sampler = seq.advantage, seq.new[t], seq.sampler[t]
    anchor = seq.sampler if o.ratio_anchor == "sampler" else seq.old
    if o.loss == "reinforce":
        return -advantage * new
    if o.loss == "dppo_tv":
        moved = math.exp(seq.still[t]) - math.exp(sampler)
        dropped = moved > o.dppo_tv if advantage > 0 else moved < -o.dppo_tv
        pull = 0.001 * (new - sampler) ** 2
        return pull if dropped else pull - advantage * math.exp(new - sampler)
    if o.loss == "cispo":
        return -min(math.exp(seq.still[t] - anchor[t]), o.cispo_cap) * advantage * new
    if o.loss == "gspo":
        gap = seq.mean([n - a for n, a in zip(seq.new, anchor, strict=True)])
    else:
        gap = new - anchor[t]
    ratio = math.exp(gap)
    if o.loss == "sapo":
        tau = o.sapo_tau_pos if advantage > 0 else o.sapo_tau_neg
        return -advantage * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    return clip_token(ratio, advantage, o.clip_low, o.clip_high, o.delta, o.dual_clip)


def entropy_bar(sequences: Sequence[Sequence_], frac: float) -> float:
    """The smallest entropy within the top share, 1 + floor(frac * (N - 1)) tokens of N."""
    values = [
        e
        for seq in sequences
        for e, trained in zip(seq.still_entropy, seq.mask, strict=True)
        if trained
    ]
    keep = 1 + math.floor(frac * (len(values) - 1) + 1e-9)
    return sorted(values, reverse=True)[keep - 1]


def loss(sequences: Sequence[Sequence_], **options: Any) -> float:
    """The loss of one optimizer update."""
    o = Options(**options)
    bar = entropy_bar(sequences, o.top_entropy_frac)
    totals = [sum(token_loss(seq, t, o, bar) for t in range(len(seq.new))) for seq in sequences]
    return aggregate(sequences, totals, o)


def token_loss(seq: Sequence_, t: int, o: Options, bar: float) -> float:
    """All that one token adds, before aggregation."""
    if not seq.mask[t]:
        return 0.0
    value = policy_token(seq, t, o)
    value *= correction_token(
        seq, t, o.correction, o.correction_level, o.correction_min, o.correction_max
    )
    if o.off_policy_threshold is not None and seq.advantage < 0:
        gap = seq.mean([s - n for s, n in zip(seq.sampler, seq.still, strict=True)])
        value = 0.0 if gap > o.off_policy_threshold else value
    if o.top_entropy_frac < 1 and seq.still_entropy[t] < bar:
        value = 0.0
    if o.beta:
        anchor = seq.sampler if "sampler" in (o.ratio_anchor, _anchor_of(o.loss)) else seq.old
        ratio = math.exp(seq.new[t] - anchor[t]) if o.kl_unbiased else 1.0
        value += o.beta * ratio * kl_token(seq.new[t], seq.ref[t], o.kl_estimator)
    return value - o.entropy_coef * seq.entropy[t]


def _anchor_of(loss: str) -> str:
    return "sampler" if loss == "dppo_tv" else "old"


def aggregate(sequences: Sequence[Sequence_], totals: list[float], o: Options) -> float:
    """From each sequence's sum to the loss."""
    lengths = [seq.length for seq in sequences]
    if o.aggregation == "token":
        return sum(totals) / sum(lengths)
    if o.aggregation == "sequence":
        parts = [total / n if n else 0.0 for total, n in zip(totals, lengths, strict=True)]
        return sum(parts) / len(parts)
    if o.aggregation == "constant":
        return sum(totals) / (len(totals) * o.max_completion_length)
    groups = sorted({seq.group for seq in sequences})
    means = []
    for group in groups:
        members = [i for i, seq in enumerate(sequences) if seq.group == group]
        count = sum(lengths[i] for i in members)
        means.append(sum(totals[i] for i in members) / count if count else 0.0)
    return sum(means) / len(groups)
