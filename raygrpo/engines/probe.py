"""The proof after each sync: the engine must compute what the learner computes.

Checksums prove that the right bytes arrived. A probe proves that the engine uses them: the learner
scores a fixed sequence at each publish, the manifest carries the logprobs, and the engine scores
the same sequence after each commit. The gap is the mean absolute difference per token. An engine
that missed one layer differs on all tokens; a few bfloat16 logits alone may differ by rounding.
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
# The largest first gap of a run, in floors: kernels differ by less, wrong weights by nats.
FIRST_LIMIT = 10.0


class ProbeCheck:
    """One generator's checks; the run's first check sets the gap that is normal for the engine.

    Attributes:
        normal_gap: the gap of the run's first version, say 2e-5; None before its check.
        last_gap: the gap of the last check; None before.
    """

    def __init__(self, dtype: str, temperature: float) -> None:
        self._floor = FLOORS[dtype]
        self._temperature = temperature
        self.normal_gap: float | None = None
        self.last_gap: float | None = None

    @property
    def tolerance(self) -> float:
        """The largest allowed gap: three times the first one, and no less than rounding's."""
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
