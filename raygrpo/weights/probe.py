"""The sequence by which the learner and the generators prove that they hold the same weights."""

from __future__ import annotations

import numpy as np

PROBE_LENGTH = 16


def probe_tokens(vocabulary: int, seed: int, max_length: int | None = None) -> tuple[int, ...]:
    """A run's sequence: a function of the run's seed and the model's vocabulary."""
    length = min(PROBE_LENGTH, max_length or PROBE_LENGTH)
    drawn = np.random.default_rng([seed, vocabulary]).integers(0, vocabulary, length)
    return tuple(drawn.tolist())
