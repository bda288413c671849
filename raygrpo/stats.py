"""Statistics that merge by addition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A mergeable statistic: merging is addition of sums and counts, and min and max."""

    sum: float
    count: float
    min: float
    max: float

    @property
    def mean(self) -> float:
        """Sum over count; NaN when nothing was counted."""
        return self.sum / self.count if self.count else math.nan

    def __add__(self, other: Stat) -> Stat:
        return Stat(
            sum=self.sum + other.sum,
            count=self.count + other.count,
            min=min(self.min, other.min),
            max=max(self.max, other.max),
        )

    @staticmethod
    def of(value: float, count: float = 1.0) -> Stat:
        """A statistic of ``count`` equal values."""
        return Stat(sum=value * count, count=count, min=value, max=value)


def merge_stats(parts: list[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Adds up statistics by name; a name that is missing in a part adds nothing."""
    merged: dict[str, Stat] = {}
    for part in parts:
        for name, stat in part.items():
            merged[name] = merged[name] + stat if name in merged else stat
    return merged
