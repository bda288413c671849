"""Solved prompts are not drawn again (No-Positive-Resampling of ScaleRL, arXiv 2510.13786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


class SolvedRows:
    """Rows whose pass rate once was at or above ``limit``.

    A group's pass rate counts once its step is settled, and acts from the next epoch on. So the
    order of prompts does not depend on the order in which a step's groups come back. Without a
    ``limit`` no row is left out.

    Attributes:
        num_restored: rows that came back because all rows were solved; the owner resets it.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._undecided: dict[int, int] = {}
        self._solved: set[int] = set()
        self._left_out: list[int] = []
        self.num_restored = 0

    def __len__(self) -> int:
        """The number of rows that are not drawn again."""
        return len(self._solved)

    def observe(self, group_id: int, row: int, rate: float | None) -> None:
        """Takes the pass rate of a group; None for a group that no reward judged."""
        if self._limit is not None and rate is not None and rate >= self._limit:
            self._undecided[group_id] = row

    def settle(self, last_group_id: int) -> None:
        """Groups up to this id are decided: their pass rates count."""
        for group_id in [number for number in self._undecided if number <= last_group_id]:
            self._solved.add(self._undecided.pop(group_id))

    def begin_epoch(self, rows: Rows) -> None:
        """Fixes the rows that this epoch leaves out; if all were left out, all come back."""
        self._left_out = sorted(self._solved) if self._limit is not None else []
        if not self.left_of(rows).size:
            self.num_restored += len(self._solved)
            self._solved.clear()
            self._left_out = []

    def left_of(self, rows: Rows) -> Rows:
        """The rows of this epoch, in the order given."""
        return rows[~np.isin(rows, self._left_out)]

    def state(self) -> dict[str, Any]:
        """The state for `restore`; plain integers."""
        return {
            "left_out": self._left_out,
            "solved": sorted(self._solved),
            "undecided": sorted(self._undecided.items()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken."""
        self._left_out, self._solved = list(state["left_out"]), set(state["solved"])
        self._undecided = dict(state["undecided"])
