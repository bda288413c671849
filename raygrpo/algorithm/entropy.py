"""Entropy in the loss: the mask of the most uncertain tokens, and the strength of the bonus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from raygrpo.algorithm.shapes import BoolBT, FloatBT, FloatN

# Step and maximum of Skywork-OR1's coefficient (2505.22312); TRL's values.
COEF_STEP, COEF_MAX = 0.005, 1.0
# Tokens after the same context (the first ones of a group) have one entropy up to rounding, and
# rounding must not decide between them.
TIE = 1e-5


def entropy_threshold(
    entropies: FloatN, frac: float, total: Callable[[float], float] = lambda value: value
) -> float:
    """The smallest entropy in the top ``frac`` of all ranks' tokens (2506.01939).

    Of M tokens on all ranks it is the k-th largest entropy, k = floor(frac (M - 1)) + 1, as in
    TRL's ``top_entropy_quantile``. The value is exact, however tokens lie on ranks: a bisection
    over the 2^31 non-negative floats finds it in 31 counts.

    Args:
        entropies: of this rank's trained tokens, nats.
        total: adds a number up over the ranks; every rank calls it equally often.
    """
    values = entropies.detach().float().clamp(min=0)
    count = total(float(values.numel()))
    rank = int(round(frac * (count - 1), 6)) + 1 if count else 0
    # Non-negative floats and their bits have one order.
    bits = values.view(torch.int32)
    low, high = 0, 2**31 - 1
    while low < high:
        middle = (low + high + 1) // 2
        if total(float((bits >= middle).sum())) >= rank:
            low = middle
        else:
            high = middle - 1
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))


def top_entropy_mask(entropies: FloatBT, mask: BoolBT, threshold: float) -> BoolBT:
    """Trained tokens whose entropy is at least the threshold, up to a relative `TIE`."""
    return mask & (entropies.detach().float().clamp(min=0) >= threshold * (1 - TIE))


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyControl:
    """The coefficient of the entropy bonus, and the last update's entropy (None before the first).

    Without a target the coefficient is constant. With one (Skywork-OR1, 2505.22312) it rises by
    `COEF_STEP` after an update whose entropy was at or below the target, and falls by as much after
    another, within [0, `COEF_MAX`]. It acts only while the last entropy is at or below the target.
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
