"""The proof after each sync: the engine must compute what the learner computes.

Checksums prove that the right bytes arrived, not that the engine uses them. So the learner scores a
fixed sequence at each publish, the manifest carries the logprobs, and an engine scores the same
sequence after each commit. The gap is the mean absolute difference per token: an engine that missed
one layer differs on all tokens, while the largest difference of a few bfloat16 logits says little.
"""

from __future__ import annotations

import numpy as np

from raygrpo.engines.base import Engine
from raygrpo.errors import ProbeFailed
from raygrpo.types import Version
from raygrpo.weights.types import Probe

FACTOR = 3.0
# Rounding of two ways to compute the same thing, in nats a token.
FLOORS = {"float32": 1e-3, "bfloat16": 5e-2}
# What a run's first gap may be at most, in floors: kernels differ by less, wrong weights by nats.
FIRST_LIMIT = 10.0


class ProbeCheck:
    """One generator's checks; the first one of a run sets what gap is normal for its engine.

    Attributes:
        normal_gap: the gap of the run's first version; None while that has not been checked.
        last_gap: the gap of the last one; None before.
    """

    def __init__(self, dtype: str, temperature: float) -> None:
        self._floor = FLOORS[dtype]
        self._temperature = temperature
        self.normal_gap: float | None = None
        self.last_gap: float | None = None

    @property
    def tolerance(self) -> float:
        """The gap that is allowed: three times the first one, and no less than rounding's."""
        if self.normal_gap is None:
            return FIRST_LIMIT * self._floor
        return max(FACTOR * self.normal_gap, self._floor)

    def check(self, engine: Engine, probe: Probe, version: Version) -> float:
        """Scores the probe; returns the gap.

        Raises:
            ProbeFailed: the gap is too large, or no number.
        """
        scores = engine.score(probe.token_ids, self._temperature)
        # The first token has no logprob: there is nothing before it.
        difference = np.abs(scores.astype(np.float64) - np.asarray(probe.logprobs))[1:]
        gap = float(difference.mean()) if difference.size else 0.0
        if not gap <= self.tolerance:
            raise ProbeFailed(version, gap, self.tolerance)
        if self.normal_gap is None:
            self.normal_gap = gap
        self.last_gap = gap
        return gap
