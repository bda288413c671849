"""Attention within segments: rows of several samples, and completions that share their prompt.

A row of T tokens that holds many segments needs only the products of each token with its own
segment and its parent's, while attention under a [T, T] mask computes all of them. Here segments of
like length become a batch of their own, whatever row they lie in, and attention runs once a batch:
causal for segments without a parent, under a small mask for those that continue one. Padding in
these batches costs attention alone, never a layer of the network. On a GPU one kernel does it all
where it can (`flat_attention`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.learner.attention import cpu as cpu_attention
from raygrpo.learner.attention import flex as flat_attention
from raygrpo.learner.attention.flex import (
    Attention,
    FlatRow,
    LayerKind,
    make_flat_row,
    served,
    settle,
)
from raygrpo.models import attention_windows, refuse_unknown
from raygrpo.types import IntArray

NAME = "raygrpo_segments"
# A segment shorter than this share of a batch's longest goes to the next batch.
_ALIKE = 0.75
# The position of what only pads.
_FUTURE = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Tokens [N, ...] to slots [S, ...] and back; every token lies in one slot at most.

    ``tokens`` [S] names each slot's token, ``empty`` the slots that only pad; ``slots`` [N] names
    each token's slot, ``absent`` the tokens without one.
    """

    tokens: Tensor
    empty: Tensor
    slots: Tensor
    absent: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Slots from tokens; padding slots hold a copy of some token."""
        taken: Tensor = _Move.apply(values, self.tokens, self.slots, self.absent)  # type: ignore[no-untyped-call]
        return taken

    def back(self, values: Tensor) -> Tensor:
        """Tokens from slots; absent tokens hold a copy of some slot."""
        put: Tensor = _Move.apply(values, self.slots, self.tokens, self.empty)  # type: ignore[no-untyped-call]
        return put


class _Move(torch.autograd.Function):
    """``values[index]`` where ``inverse`` undoes it, so that the gradient needs no addition."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor, lost: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, lost)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, lost = ctx.saved_tensors
        return gradient.index_select(0, inverse).index_fill_(0, lost, 0), None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The parents of a batch's segments: ``gather`` their tokens, [parents, length] aligned right.

    ``parent`` [n] is each segment's. ``positions`` [n, length + Q] are those of its keys, its own
    last, and far in the future where nothing is; [1, length + Q] when all segments have the same.
    """

    gather: Gather
    num_parents: int
    parent: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Segments of like length: ``num`` rows of ``length`` slots from slot ``start`` on."""

    start: int
    num: int
    length: int
    prefix: Prefix | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """How a microbatch's tokens become batches of segments.

    ``masks`` are made once a forward pass, when the first layer that needs one asks. ``row`` is
    the same for one kernel, on devices that have it.
    """

    gather: Gather
    batches: tuple[Batch, ...]
    row: FlatRow | None = None
    masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = field(default_factory=dict)

    def mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The additive mask of a batch, [num or 1, 1, Q, K]; None where causal attention is it."""
        key = (number, window, dtype)
        if key not in self.masks:
            self.masks[key] = self._make_mask(self.batches[number], window, dtype)
        return self.masks[key]

    def _make_mask(self, batch: Batch, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if batch.prefix is not None:
            keys = batch.prefix.positions
        elif window is None or window >= batch.length:
            return None
        else:
            keys = torch.arange(batch.length, device=self.gather.tokens.device)[None]
        distance = keys[:, -batch.length :, None] - keys[:, None, :]
        # What only pads is far in the future of all that is not, and sees itself.
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """Tokens [L] of a segment, as indices into the flattened microbatch, and its parent's."""

    tokens: IntArray
    parent: int | None


def make_plan(
    positions: IntArray, segment_ids: IntArray, parent_ids: IntArray, device: torch.device
) -> SegmentPlan:
    """The plan of a microbatch, from its arrays [B, T].

    Positions rise by one within a segment; a parent has no parent itself.
    """
    segments = _find_segments(segment_ids, parent_ids)
    order = sorted(range(len(segments)), key=lambda i: _sort_key(segments, i))
    runs: list[list[int]] = []
    for index in order:
        if not runs or not _alike(segments, runs[-1][0], index):
            runs.append([])
        runs[-1].append(index)
    places, batches, start = [], [], 0
    for run in runs:
        length = segments[run[0]].tokens.size
        places.append(_aligned([segments[i].tokens for i in run], length))
        prefix = _make_prefix(segments, run, positions.ravel(), device)
        batches.append(Batch(start=start, num=len(run), length=length, prefix=prefix))
        start += len(run) * length
    slots = np.concatenate([place.ravel() for place in places])
    arrays = (positions, segment_ids, parent_ids)
    return SegmentPlan(
        gather=_make_gather(slots, positions.size, device),
        batches=tuple(batches),
        row=make_flat_row(*arrays, device) if device.type == "cuda" else None,
    )


def _find_segments(segment_ids: IntArray, parent_ids: IntArray) -> list[_Segment]:
    width = segment_ids.shape[1]
    found: list[_Segment] = []
    for row, (ids, parents) in enumerate(zip(segment_ids, parent_ids, strict=True)):
        known: dict[int, int] = {}
        columns = np.flatnonzero(ids >= 0)
        edges = np.flatnonzero(np.diff(ids[columns])) + 1
        for run in np.split(columns, edges) if columns.size else []:
            parent = int(parents[run[0]])
            known[int(ids[run[0]])] = len(found)
            where = known[parent] if parent >= 0 else None
            found.append(_Segment(tokens=(row * width + run).astype(np.int32), parent=where))
    return found


def _sort_key(segments: list[_Segment], index: int) -> tuple[int, int]:
    """The class of the parent's length, parentless first; then by length, long before short."""
    return _prefix_class(segments, index), -segments[index].tokens.size


def _prefix_class(segments: list[_Segment], index: int) -> int:
    """Parents of a class differ in length by less than the factor `_ALIKE`."""
    parent = segments[index].parent
    if parent is None:
        return -1
    return int(math.log(segments[parent].tokens.size) / -math.log(_ALIKE))


def _alike(segments: list[_Segment], first: int, other: int) -> bool:
    same_class = _prefix_class(segments, first) == _prefix_class(segments, other)
    sizes = segments[first].tokens.size, segments[other].tokens.size
    return same_class and sizes[1] >= _ALIKE * sizes[0]


def _aligned(runs: Iterable[IntArray], length: int, *, right: bool = False) -> IntArray:
    """Runs of indices as rows [n, length], padded with -1."""
    rows = []
    for run in runs:
        pad = np.full(length - run.size, -1, np.int32)
        rows.append(np.concatenate([pad, run] if right else [run, pad]))
    return np.stack(rows)


def _make_gather(slots: IntArray, num_tokens: int, device: torch.device) -> Gather:
    """From each slot's token, -1 for padding."""
    filled = np.flatnonzero(slots >= 0)
    back = np.full(num_tokens, -1, np.int64)
    back[slots[filled]] = filled
    absent = np.flatnonzero(back < 0)
    arrays = (slots.clip(0), np.flatnonzero(slots < 0), back.clip(0), absent)
    tokens, empty, inverse, lost = (
        torch.tensor(array, dtype=torch.long, device=device) for array in arrays
    )
    return Gather(tokens=tokens, empty=empty, slots=inverse, absent=lost)


def _make_prefix(
    segments: list[_Segment], run: list[int], positions: IntArray, device: torch.device
) -> Prefix | None:
    above = [segments[i].parent for i in run]
    parents = sorted({parent for parent in above if parent is not None})
    if not parents:
        return None
    length = segments[run[0]].tokens.size
    longest = max(segments[parent].tokens.size for parent in parents)
    prompts = _aligned([segments[p].tokens for p in parents], longest, right=True)
    which = np.array([parents.index(parent) for parent in above if parent is not None])
    own = _aligned([segments[i].tokens for i in run], length)
    keys = np.concatenate([prompts[which], own], 1)
    when = np.where(keys >= 0, positions[keys], _FUTURE)
    if (when == when[:1]).all():
        when = when[:1]
    return Prefix(
        gather=_make_gather(prompts.ravel(), positions.size, device),
        num_parents=len(parents),
        parent=torch.tensor(which, device=device),
        positions=torch.tensor(when, device=device),
    )


def segment_attention(
    module: Any,
    query: Tensor,  # [B, heads, T, D]
    key: Tensor,  # [B, key heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: SegmentPlan | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; without ``segments`` its own SDPA.

    With them ``attention_mask`` only tells the window, see `window_marks`.

    Raises:
        ValueError: the layer wants what is not known here.
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return plain
    refuse_unknown(options, "segments")
    if attention_mask is None or attention_mask.shape[:3] != (1, 1, 1):
        raise ValueError("the layer was not told its window")
    window = attention_mask.shape[-1] - 1 or None
    if segments.row is not None:
        flat = _attend_flat(segments.row, query, key, value, window, scaling)
        if flat is not None:
            return flat, None
    return _attend_in_batches(segments, query, key, value, window, scaling), None


def _attend_flat(
    row: FlatRow, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: Any
) -> Tensor | None:
    """Attention by one kernel; None for kinds of layers for which it failed or was wrong."""
    heads, size = query.shape[1], query.shape[3]
    kind = LayerKind(query.device, query.dtype, heads, key.shape[1], size, scaling)
    if kind not in served:
        settle(kind, flat_attention.disagreement(kind, partial(_both_ways, scaling)))
    if served[kind]:
        try:
            return flat_attention.attend(row, query, key, value, window, scaling)
        except flat_attention.compile_errors() as error:
            settle(kind, f"fails: {type(error).__name__}: {str(error)[:500]}")
    return None


def _both_ways(scaling: Any, *arrays: Any) -> tuple[Attention, Attention]:
    """Attention by one kernel and by batches, for the arguments of `make_flat_row`."""
    row, plan = make_flat_row(*arrays), make_plan(*arrays)
    return (
        lambda q, k, v, window: flat_attention.attend(row, q, k, v, window, scaling),
        lambda q, k, v, window: _attend_in_batches(plan, q, k, v, window, scaling),
    )


def _attend_in_batches(
    segments: SegmentPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Attention [B, T, heads, D] of segments of like length at a time."""
    tokens = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    slots = [segments.gather(t) for t in tokens]
    outputs = []
    for number, batch in enumerate(segments.batches):
        here = slice(batch.start, batch.start + batch.num * batch.length)
        q, k, v = (t[here].view(batch.num, batch.length, *t.shape[1:]) for t in slots)
        if batch.prefix is not None:
            k, v = (
                torch.cat([_prompts(t, batch.prefix), own], 1)
                for t, own in ((tokens[1], k), (tokens[2], v))
            )
        mask = segments.mask(number, window, query.dtype)
        outputs.append(_attend(q, k, v, mask, scaling).flatten(0, 1))
    together = segments.gather.back(torch.cat(outputs))
    return together.view(query.shape[0], query.shape[2], *together.shape[1:])


def _prompts(tokens: Tensor, prefix: Prefix) -> Tensor:
    """Each segment's parent's keys or values [n, length, heads, D]."""
    parents = prefix.gather(tokens).view(prefix.num_parents, -1, *tokens.shape[1:])
    return parents.index_select(0, prefix.parent)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of [n, L, heads, D], with as many or fewer key heads."""
    repeats = query.shape[2] // key.shape[2]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return cpu_attention.attend(query, key, value, mask, scaling).transpose(1, 2)
    if repeats > 1:
        key, value = (
            t[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (key, value)
        )
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, is_causal=mask is None
    )
    return output.transpose(1, 2)


def window_marks(config: Any, like: Tensor) -> Any:
    """What a model passes to its layers in the place of masks: their window, in a shape.

    A model sorts its layers by the mask that each kind of them gets, so a mark of width window + 1
    reaches those with a sliding window, and one of width 1 the others.
    """
    mark = like.new_zeros(1)
    windows = attention_windows(config)
    marks = {kind: mark.expand(1, 1, 1, (size or 0) + 1) for kind, size in windows.items()}
    return marks if len(marks) > 1 else next(iter(marks.values()))


def use_segments(model: Any) -> None:
    """Makes a model's layers call `segment_attention`; its own attention must be SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
