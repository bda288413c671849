"""Attention by segment on a GPU: torch's flex attention, with a microbatch as one row of tokens.

Visibility has two forms: exact, for each pair of tokens, and coarse, for pairs of blocks of tokens,
which tells the blocks to skip. All completions read their prompt's keys and values where they lie.

No GPU has run flex attention with raygrpo yet. So each kind of layer first compares flex attention
with attention by batches of segments, on small rows (`disagreement`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.types import IntArray

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Int32

# The tokens of a block; flex attention's default.
BLOCK = 128
# Above every position.
_NEVER = 2**30
# Norms of differences: bfloat16 rounds to 0.005, a wrong mask differs by more than 0.1.
_TOLERANCE = 0.03
# Lengths of prompts and their completions. Two shapes make torch compile a kernel for any shape.
_PROBES = (((200, (90, 130)), (70, ())), ((300, (250, 10, 140)), (5, (130,)), (170, ())))
_WINDOWS = (None, 50)

# From query, key and value [B, heads, T, D] and window to attention [B, T, heads, D].
Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """The properties of a layer that a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int
    scaling: float | None


class FlatRow:
    """A microbatch's tokens, one row after the other, padded to whole blocks.

    The masks of a row are cached: the first layer of each window makes the window's mask.

    Attributes:
        segments: a number for each segment of each row; padding tokens are segments of their own,
            below -1.
        parents: the parent's segment; -1 for none.
        positions: of each token in its sequence.
    """

    def __init__(
        self,
        segments: Int32[Tensor, "T"],
        parents: Int32[Tensor, "T"],
        positions: Int32[Tensor, "T"],
    ) -> None:
        self.segments = segments
        self.parents = parents
        self.positions = positions
        self._masks: dict[int | None, Any] = {}

    def mask(self, window: int | None) -> Any:
        """The `BlockMask` of layers with this window."""
        if window not in self._masks:
            self._masks[window] = _make_mask(self, window)
        return self._masks[window]

    def sees(
        self, window: int | None
    ) -> Callable[[Any, Any, Int[Tensor, "*shape"], Int[Tensor, "*shape"]], Bool[Tensor, "*shape"]]:
        """Flex attention's ``mask_mod``: whether a query sees a key, from their indices."""
        segments, parents, positions = self.segments, self.parents, self.positions
        # As a tensor, not a number, so that layers with and without a window share a kernel.
        since = positions - ((window or _NEVER) - 1)

        def visible(
            _batch: Any, _head: Any, query: Int[Tensor, "*shape"], key: Int[Tensor, "*shape"]
        ) -> Bool[Tensor, "*shape"]:
            related = (segments[query] == segments[key]) | (parents[query] == segments[key])
            before = (positions[key] <= positions[query]) & (positions[key] >= since[query])
            return related & before

        return visible


def make_flat_row(
    positions: Int[IntArray, "B T"],
    segment_ids: Int[IntArray, "B T"],
    parent_ids: Int[IntArray, "B T"],
    device: torch.device,
) -> FlatRow:
    """The row of a microbatch's arrays; padding tokens have a segment id below 0."""
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
    return FlatRow(*tensors)


def attend(
    row: FlatRow,
    query: Float[Tensor, "B heads T D"],
    key: Float[Tensor, "B key_heads T D"],
    value: Float[Tensor, "B key_heads T D"],
    window: int | None,
    scaling: float | None,
) -> Float[Tensor, "B T heads D"]:
    """Attention over the row by one kernel."""
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
    """Flex attention, compiled; with ``fullgraph`` a failed compilation is an error."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def compile_errors() -> tuple[type[Exception], ...]:
    """The errors of a call whose compilation fails; checkpointing's signals are not among them."""
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


def _listed(
    pairs: Bool[Tensor, "Q K"],
) -> tuple[Int32[Tensor, "1 1 Q"], Int32[Tensor, "1 1 Q K"]]:
    """The number of key blocks of each query block, and all blocks with those numbers first."""
    order = pairs.int().argsort(dim=-1, descending=True, stable=True)
    return pairs.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def block_pairs(
    row: FlatRow, window: int | None
) -> tuple[Bool[Tensor, "Q K"], Bool[Tensor, "Q K"]]:
    """For blocks of queries and keys: whether some query sees some key; whether each sees all.

    Both are bounds: a False of the first and a True of the second are certain.
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

    def meets(lowest: Int[Tensor, "Q"], highest: Int[Tensor, "Q"]) -> Bool[Tensor, "Q K"]:
        return (low[None] <= highest[:, None]) & (high[None] >= lowest[:, None])

    number = torch.arange(len(segments), device=segments.device)
    # A token's parent, and the visible part of its own segment, lie before the token in the row.
    before = number[None] < number[:, None]
    some = before & (meets(low, high) | meets(parent_low, parent_high))
    some &= latest[None] >= first_seen[:, None]
    # Blocks of one segment alone, and blocks whose tokens all have one parent (siblings included).
    whole = real.all(1) & (low == high)
    own = whole[:, None] & (low[None] == low[:, None])
    parent = (parents.amin(1) == parents.amax(1))[:, None] & (low[None] == parents[:, :1])
    every = before & whole[None] & (own | parent)
    every &= (earliest[None] >= last_first_seen[:, None]) & (latest[None] <= earliest[:, None])
    return some | torch.eye(len(number), dtype=torch.bool, device=number.device), every


def _range(
    values: Int32[Tensor, "K BLOCK"], counted: Bool[Tensor, "K BLOCK"]
) -> tuple[Int32[Tensor, "K"], Int32[Tensor, "K"]]:
    """Least and greatest counted value of each block; an empty range where nothing is counted."""
    return values.where(counted, _NEVER).amin(1), values.where(counted, -_NEVER).amax(1)


def disagreement(kind: LayerKind, ways: Callable[..., tuple[Attention, Attention]]) -> str | None:
    """The difference of two ways to attend in value or gradient, in words; None if there is none.

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
            # A compiler of kernels may raise any error.
            except Exception as error:
                return f"fails: {type(error).__name__}: {str(error)[:500]}"
            gaps = [float((a - b).norm() / b.norm()) for a, b in zip(first, second, strict=True)]
            if not all(gap < _TOLERANCE for gap in gaps):
                return f"differs by {gaps} of the norm in probe {number} with window {window}"
    return None


def _results(
    kind: LayerKind, attention: Attention, window: int | None, segments: Int[IntArray, "1 T"]
) -> list[Float[Tensor, "..."]]:
    """Output and gradients of one way to attend, for random inputs and upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    real = torch.tensor(segments >= 0, device=kind.device)
    query, key, value, upstream = (
        torch.randn(1, heads, segments.size, kind.size, generator=generator)
        .to(kind.device, kind.dtype)
        .requires_grad_()
        for heads in (kind.heads, kind.key_heads, kind.key_heads, kind.heads)
    )
    # Activation checkpointing may be under way; it must not see the tensors saved here.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.enable_grad(), keep:
        output = attention(query, key, value, window)[real]
        total = (output * upstream.detach().transpose(1, 2)[real]).sum()
        gradients = torch.autograd.grad(total, (query, key, value))
    return [t.detach().float() for t in (output, *gradients)]


def _probe_arrays(trees: Sequence[tuple[int, Sequence[int]]]) -> tuple[Int[IntArray, "1 T"], ...]:
    parts: list[tuple[int, int, int]] = []
    for prompt, completions in trees:
        number = len(parts)
        parts += [(0, prompt, -1), *((prompt, size, number) for size in completions)]
    return row_arrays(parts, padding=3)


def row_arrays(
    parts: Sequence[tuple[int, int, int]], *, padding: int
) -> tuple[Int[IntArray, "1 T"], ...]:
    """Positions, segments and parents of segments that lie one after the other in one row.

    Args:
        parts: first position, length and parent of each segment; -1 for no parent.
        padding: tokens behind the last segment.
    """
    starts, sizes, parents = (np.array(part) for part in zip(*parts, (0, padding, -1), strict=True))
    segments = np.array([*range(len(parts)), -1])
    positions = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    arrays = (np.concatenate(positions), np.repeat(segments, sizes), np.repeat(parents, sizes))
    return tuple(array.astype(np.int32)[None] for array in arrays)
