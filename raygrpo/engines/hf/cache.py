"""A key-value cache of slots: each row of a batch writes and sees its own length.

Each layer has a preallocated pair of tensors [rows, heads, positions, head_dim]. The first rows are
in use. The caller masks positions that a row has not written; they are always finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 64


@dataclass(slots=True)
class Plan:
    """The places that the next forward pass writes and reads; shared by all layers.

    A prefill writes positions [start, stop) of the rows ``prefilled``: of one row, or of several
    rows from position 0 on. A decode (``prefilled`` is empty) writes ``positions`` [R], one in each
    of the first R rows, and reads the first ``stop`` positions.
    """

    rows: int = 0
    length: int = 0
    prefilled: list[int] = field(default_factory=list)
    start: int = 0
    stop: int = 0
    positions: Tensor | None = None
    targets: dict[int, Tensor] = field(default_factory=dict)

    def target(self, num_heads: int) -> Tensor:
        """Indices [R * heads] of the written vectors in a layer viewed as [*, head_dim]."""
        if num_heads not in self.targets:
            positions = self.positions
            assert positions is not None
            rows = torch.arange(positions.shape[0] * num_heads, device=positions.device)
            self.targets[num_heads] = rows * self.length + positions.repeat_interleave(num_heads)
        return self.targets[num_heads]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values."""

    is_sliding = False

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.keys: Tensor = torch.empty(0)
        self.values: Tensor = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the tensors, with the model's number of heads and sizes."""
        self.keys = self._grown(key_states[:0])
        self.values = self._grown(value_states[:0])
        self.is_initialized = True

    def grow(self) -> None:
        """Takes on the plan's size, and keeps the written positions."""
        if self.is_initialized:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, old: Tensor) -> Tensor:
        rows, heads, length, width = old.shape
        new = old.new_zeros(self.plan.rows, heads, self.plan.length, width)
        if rows:
            new[:rows, :, :length] = old
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes by the plan; returns the keys and values that the queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, cache: Tensor, states: Tensor) -> Tensor:
        plan = self.plan
        if plan.prefilled:
            cache[plan.prefilled, :, plan.start : plan.stop] = states
            row = plan.prefilled[0]
            return states if plan.start == 0 else cache[row : row + 1, :, : plan.stop]
        batch, heads, _, width = states.shape
        cache.view(-1, width).index_copy_(0, plan.target(heads), states.reshape(-1, width))
        return cache[:batch, :, : plan.stop]

    def get_seq_length(self) -> int:
        """Positions before the ones being written."""
        return self.plan.start

    def get_max_length(self) -> int:
        """-1: the cache grows."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that the queries see, and the first key's offset."""
        return self.plan.stop, 0


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of all layers, and moves of whole rows."""

    def __init__(self, num_layers: int) -> None:
        self.plan = Plan()
        super().__init__(layers=[SlotLayer(self.plan) for _ in range(num_layers)])

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for rows and positions; each grows by at least half, positions in blocks."""
        plan = self.plan
        if rows <= plan.rows and length <= plan.length:
            return
        if length > plan.length:
            length = max(length, plan.length * 3 // 2)
            plan.length = -(-length // GROWTH) * GROWTH
        if rows > plan.rows:
            plan.rows = max(rows, plan.rows * 3 // 2)
        for layer in self.layers:
            layer.grow()

    def plan_prefill(self, rows: list[int], start: int, stop: int) -> None:
        """The next forward pass computes positions [start, stop) of rows, of one if start > 0."""
        assert start == 0 or len(rows) == 1
        self.plan.prefilled, self.plan.start, self.plan.stop = rows, start, stop

    def plan_decode(self, positions: Tensor, stop: int) -> None:
        """The next forward pass computes one position of each of the first rows."""
        plan = self.plan
        plan.prefilled, plan.start, plan.stop, plan.positions = [], stop - 1, stop, positions
        plan.targets = {}

    def share(self, row: int, count: int, length: int) -> None:
        """Copies a row's first positions to the ``count`` rows after it."""
        for layer in self.layers:
            for cache in (layer.keys, layer.values):
                cache[row + 1 : row + 1 + count, :, :length] = cache[row, :, :length]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copies the first positions of rows over other rows."""
        for layer in self.layers:
            for cache in (layer.keys, layer.values) if layer.is_initialized else ():
                cache[targets, :, :length] = cache[sources, :, :length]

    def clear(self, rows: list[int]) -> None:
        """Zeroes rows with values that are not finite: a mask cannot hide NaN."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[rows] = 0
                layer.values[rows] = 0
