"""Entropy in the loss: which tokens are forks, and how strong the bonus is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# How the coefficient of Skywork-OR1 (2505.22312) moves, and how far; TRL's values.
COEF_STEP, COEF_MAX = 0.005, 1.0
# Tokens after the same context (the first ones of a group) have one entropy, but for rounding,
# which must not decide between them.
TIE = 1e-5


def entropy_threshold(
    entropies: Tensor, frac: float, total: Callable[[float], float] = lambda value: value
) -> float:
    """The entropy from which on a token is in the top ``frac`` of all ranks' tokens.

    Of N tokens it is the k-th largest entropy, k = floor(frac (N - 1)) + 1: the tokens at or above
    it are those that TRL's ``top_entropy_quantile`` keeps (2506.01939 has the method). Exact and
    independent of how tokens lie on ranks: a bisection over the 2^31 floats that are not negative,
    each of its 31 steps one count.

    Args:
        entropies: [n] of this rank's trained tokens, nats.
        total: sums a number over the ranks; called equally often on each.
    """
    values = entropies.detach().float().clamp(min=0)
    count = total(float(values.numel()))
    rank = int(round(frac * (count - 1), 6)) + 1 if count else 0
    # Floats that are not negative are ordered as their bits are.
    bits = values.view(torch.int32)
    low, high = 0, 2**31 - 1
    while low < high:
        middle = (low + high + 1) // 2
        if total(float((bits >= middle).sum())) >= rank:
            low = middle
        else:
            high = middle - 1
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))


def top_entropy_mask(entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Trained tokens [B, T] with at least that entropy, ties (`TIE`, relative) included."""
    return mask & (entropies.detach().float().clamp(min=0) >= threshold * (1 - TIE))


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyControl:
    """The coefficient of the entropy bonus, and the last update's entropy (None: none yet).

    With a target (Skywork-OR1, 2505.22312) the coefficient rises by `COEF_STEP` after each update
    whose entropy was at or below it and falls otherwise, within [0, `COEF_MAX`], and acts only
    while the last entropy was at or below the target. Without a target it is constant.
    """

    coef: float
    target: float | None = None
    entropy: float | None = None

    @property
    def applied(self) -> float:
        """The coefficient of the next update."""
        if self.target is None:
            return self.coef
        acts = self.entropy is not None and self.entropy <= self.target
        return self.coef if acts else 0.0

    def after(self, entropy: float) -> EntropyControl:
        """The state after an update whose mean entropy over all trained tokens was ``entropy``."""
        if self.target is None:
            return self
        step = COEF_STEP if entropy <= self.target else -COEF_STEP
        coef = min(max(self.coef + step, 0.0), COEF_MAX)
        return EntropyControl(coef=coef, target=self.target, entropy=entropy)
