"""Attention by segment on a GPU: torch's flex attention, with a microbatch as one row of tokens.

Who sees whom is said twice: exactly, for each pair of tokens, and for pairs of blocks of tokens,
where nothing is computed. A prompt's keys and values are read where they lie, by all that share it.

No GPU has run it with raygrpo yet, so each kind of layer first compares it with attention by
batches of segments, on small rows; what fails there, or differs, is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.types import IntArray

log = logging.getLogger(__name__)

# The tokens of a block, as flex attention has them by default.
BLOCK = 128
# Above every position.
_NEVER = 2**30
# Norms of differences: bfloat16 rounds to 0.005, a mask that is wrong shows above 0.1.
_TOLERANCE = 0.03
# Two shapes, so that the kernel is compiled for any; lengths of prompts and their completions.
_PROBES = (((200, (90, 130)), (70, ())), ((300, (250, 10, 140)), (5, (130,)), (170, ())))
_WINDOWS = (None, 50)

# Query, key and value [B, heads, T, D] and window to attention [B, T, heads, D].
Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int
    scaling: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatRow:
    """A microbatch's tokens [T] one row after the other, padded to whole blocks; int32.

    ``segments`` are numbers of their own in every row. A token that only pads is a segment of its
    own, below -1. ``parents`` are -1 where there is none. ``masks`` are made once a forward pass
    for each window, when the first layer that needs one asks.
    """

    segments: Tensor
    parents: Tensor
    positions: Tensor
    masks: dict[int | None, Any] = field(default_factory=dict)

    def mask(self, window: int | None) -> Any:
        """The `BlockMask` of layers with this window."""
        if window not in self.masks:
            self.masks[window] = _make_mask(self, window)
        return self.masks[window]

    def sees(self, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """Whether a query sees a key, from their indices; as flex attention calls it."""
        segments, parents, positions = self.segments, self.parents, self.positions
        # A tensor rather than a number: layers with and without a window share a kernel.
        since = positions - ((window or _NEVER) - 1)

        def visible(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
            related = (segments[query] == segments[key]) | (parents[query] == segments[key])
            before = (positions[key] <= positions[query]) & (positions[key] >= since[query])
            return related & before

        return visible


# Whether flex attention serves a kind of layer, once it is known.
served: dict[LayerKind, bool] = {}


def settle(kind: LayerKind, reason: str | None) -> None:
    """Notes, and says once, that it serves, or why not."""
    served[kind] = reason is None
    if reason is None:
        log.info("attention by flex attention in %s", kind)
    else:
        log.warning("attention by batches in %s, since flex attention %s", kind, reason)


def make_flat_row(
    positions: IntArray, segment_ids: IntArray, parent_ids: IntArray, device: torch.device
) -> FlatRow:
    """From a microbatch's arrays [B, T]; what pads has a segment id below 0."""
    rows, width = segment_ids.shape
    first = np.arange(rows)[:, None] * width
    segments = np.where(segment_ids >= 0, segment_ids + first, -1).ravel()
    parents = np.where(parent_ids >= 0, parent_ids + first, -1).ravel()
    more = -segments.size % BLOCK
    arrays = [np.pad(a, (0, more), constant_values=-1) for a in (segments, parents)]
    arrays.append(np.pad(positions.ravel(), (0, more)))
    alone = arrays[0] < 0
    arrays[0] = np.where(alone, -2 - np.arange(alone.size), arrays[0])
    tensors = [torch.tensor(array, dtype=torch.int32, device=device) for array in arrays]
    return FlatRow(segments=tensors[0], parents=tensors[1], positions=tensors[2])


def attend(
    row: FlatRow, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: Any
) -> Tensor:
    """Attention of [B, heads, T, D], with as many or fewer key heads, as [B, T, heads, D]."""
    num_rows, _, length, _ = query.shape
    more = len(row.segments) - num_rows * length
    flat = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    q, k, v = (
        torch.nn.functional.pad(t, (0, 0, 0, 0, 0, more))[None].transpose(1, 2) for t in flat
    )
    output = _flex_attention()(
        q, k, v, block_mask=row.mask(window), scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    together: Tensor = output[0].transpose(0, 1)[: num_rows * length]
    return together.view(num_rows, length, *together.shape[1:])


@cache
def _flex_attention() -> Any:
    """Compiled; with ``fullgraph``, what cannot be compiled is an error and never merely slow."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def compile_errors() -> tuple[type[Exception], ...]:
    """What a call raises where compilation fails; signals of checkpointing are none of them."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def _make_mask(row: FlatRow, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    sees = row.sees(window)
    some, every = block_pairs(row, window)
    (count, order), (full_count, full_order) = (_listed(p) for p in (some & ~every, every))
    return BlockMask.from_kv_blocks(
        count, order, full_count, full_order, BLOCK_SIZE=BLOCK, mask_mod=sees
    )


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers first: [1, 1, ...]."""
    order = pairs.int().argsort(dim=-1, descending=True, stable=True)
    return pairs.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def block_pairs(row: FlatRow, window: int | None) -> tuple[Tensor, Tensor]:
    """For blocks [Q, K]: whether some token of Q may see one of K, and whether each sees all.

    The first is right where it says no, the second where it says yes.
    """
    segments, parents, positions = (
        t.view(-1, BLOCK) for t in (row.segments, row.parents, row.positions)
    )
    real = segments >= 0
    since = positions - ((window or _NEVER) - 1)
    low, high = _range(segments, real)
    parent_low, parent_high = _range(parents, parents >= 0)
    latest, earliest = _range(positions, real)[1], positions.amin(1)
    first_seen, last_first_seen = _range(since, real)[0], since.amax(1)

    def meets(lowest: Tensor, highest: Tensor) -> Tensor:
        return (low[None] <= highest[:, None]) & (high[None] >= lowest[:, None])

    number = torch.arange(len(segments), device=segments.device)
    # A parent, and what a token sees of its own segment, lie before it in the row.
    before = number[None] < number[:, None]
    some = before & (meets(low, high) | meets(parent_low, parent_high))
    some &= latest[None] >= first_seen[:, None]
    # Blocks of one segment alone; blocks whose tokens all have one parent, be they siblings.
    whole = real.all(1) & (low == high)
    own = whole[:, None] & (low[None] == low[:, None])
    parent = (parents.amin(1) == parents.amax(1))[:, None] & (low[None] == parents[:, :1])
    every = before & whole[None] & (own | parent)
    every &= (earliest[None] >= last_first_seen[:, None]) & (latest[None] <= earliest[:, None])
    return some | torch.eye(len(number), dtype=torch.bool, device=number.device), every


def _range(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of those that count in each block; an empty range where none does."""
    return values.where(counted, _NEVER).amin(1), values.where(counted, -_NEVER).amax(1)


def disagreement(kind: LayerKind, ways: Callable[..., tuple[Attention, Attention]]) -> str | None:
    """What one way to attend has, in value or gradient, that the other has not; None if nothing.

    ``ways`` makes both for a row's positions, segments and parents [1, T] on a device.
    """
    for number, lengths in enumerate(_PROBES):
        arrays = _probe_arrays(lengths)
        attentions = ways(*arrays, kind.device)
        for window in _WINDOWS:
            try:
                first, second = (_results(kind, way, window, arrays[1]) for way in attentions)
            except torch.OutOfMemoryError:
                raise
            # Whatever a compiler raises.
            except Exception as error:
                return f"fails: {type(error).__name__}: {str(error)[:500]}"
            gaps = [float((a - b).norm() / b.norm()) for a, b in zip(first, second, strict=True)]
            if not all(gap < _TOLERANCE for gap in gaps):
                return f"differs by {gaps} of the norm in probe {number} with window {window}"
    return None


def _results(
    kind: LayerKind, attention: Attention, window: int | None, segments: IntArray
) -> list[Tensor]:
    """Output and gradients of one way to attend, for random inputs and upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    real = torch.tensor(segments >= 0, device=kind.device)
    query, key, value, upstream = (
        torch.randn(1, heads, segments.size, kind.size, generator=generator)
        .to(kind.device, kind.dtype)
        .requires_grad_()
        for heads in (kind.heads, kind.key_heads, kind.key_heads, kind.heads)
    )
    # Activation checkpointing, which may be under way, must not see what is saved here.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.enable_grad(), keep:
        output = attention(query, key, value, window)[real]
        total = (output * upstream.detach().transpose(1, 2)[real]).sum()
        gradients = torch.autograd.grad(total, (query, key, value))
    return [t.detach().float() for t in (output, *gradients)]


def _probe_arrays(trees: Sequence[tuple[int, Sequence[int]]]) -> tuple[IntArray, ...]:
    """Positions, segments and parents [1, T] of trees in a row, and three tokens that pad."""
    found: list[tuple[int, int, int, int]] = []
    for prompt, completions in trees:
        number = len(found)
        found.append((0, prompt, number, -1))
        found += [(prompt, size, number + 1 + i, number) for i, size in enumerate(completions)]
    found.append((0, 3, -1, -1))
    starts, sizes, segments, parents = (np.array(part) for part in zip(*found, strict=True))
    positions = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    arrays = (np.concatenate(positions), np.repeat(segments, sizes), np.repeat(parents, sizes))
    return tuple(array.astype(np.int32)[None] for array in arrays)
