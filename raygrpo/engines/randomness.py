"""Uniform random numbers as a pure function of their purpose: a counter-based generator.

The number behind a token depends on (seed, stream, group id, completion index, token position)
alone. The batch, the engine, the attempt and the history play no part.
The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from raygrpo.types import Stream

KeyArray = npt.NDArray[np.uint64]

_STREAMS: Final[dict[Stream, int]] = {"train": 1, "eval": 2}
_MASK: Final = 2**64 - 1


def row_keys(seed: int, stream: Stream, group_id: int, num_completions: int) -> KeyArray:
    """One key for each completion of a group, [num_completions]."""
    key = np.zeros(num_completions, np.uint64)
    for part in (seed & _MASK, seed >> 64 & _MASK, _STREAMS[stream], group_id & _MASK):
        key = _mix(key ^ np.full(1, part, np.uint64))
    return _mix(key ^ np.arange(num_completions, dtype=np.uint64))


def uniforms(keys: KeyArray, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each row's token at ``positions`` [R], in steps of 2**-53."""
    bits = _mix(_mix(keys) ^ positions.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: KeyArray) -> KeyArray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
