"""Attention within segments: rows of several samples, and completions that share their prompt.

A token needs only the products with its own segment and its parent segment; attention under a mask
of [T, T] computes those with the whole row. Here segments of like length form a batch, in whatever
rows they lie, and attention runs once per batch: causal for segments without a parent, under a mask
of their own for segments that continue one. Padding in a batch costs attention alone.

`SegmentAttention` is the function that a model's layers call. On a GPU it uses flex attention
(`flex`) for the kinds of layers that a comparison finds right, and batches for all others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.learner.attention import cpu, flex
from raygrpo.models import attention_windows, refuse_unknown
from raygrpo.types import IntArray

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

log = logging.getLogger(__name__)

NAME = "raygrpo_segments"
# A segment shorter than this share of a batch's longest goes to the next batch.
_ALIKE = 0.75
# The position of padding.
_FUTURE = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Moves values of tokens into slots and back; a token lies in one slot at most.

    Attributes:
        tokens: the token of each slot.
        empty: the slots that only pad.
        slots: the slot of each token.
        absent: the tokens without a slot.
    """

    tokens: Int[Tensor, "slots"]
    empty: Int[Tensor, "padding"]
    slots: Int[Tensor, "N"]
    absent: Int[Tensor, "absent"]

    def __call__(self, values: Float[Tensor, "N *rest"]) -> Float[Tensor, "slots *rest"]:
        """Slots from tokens; padding slots hold a copy of some token."""
        taken: Tensor = _Move.apply(values, self.tokens, self.slots, self.absent)  # type: ignore[no-untyped-call]
        return taken

    def back(self, values: Float[Tensor, "slots *rest"]) -> Float[Tensor, "N *rest"]:
        """Tokens from slots; absent tokens hold a copy of some slot."""
        put: Tensor = _Move.apply(values, self.slots, self.tokens, self.empty)  # type: ignore[no-untyped-call]
        return put


class _Move(torch.autograd.Function):
    """``values[index]``, with the gradient ``gradient[inverse]``: a move needs no addition."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, "from *rest"],
        index: Int[Tensor, "to"],
        inverse: Int[Tensor, "from"],
        lost: Int[Tensor, "lost"],
    ) -> Float[Tensor, "to *rest"]:
        ctx.save_for_backward(inverse, lost)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "to *rest"]) -> Any:
        inverse, lost = ctx.saved_tensors
        return gradient.index_select(0, inverse).index_fill_(0, lost, 0), None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The parents of a batch's segments.

    Attributes:
        gather: moves the parents' tokens into [num_parents, length] slots, aligned right.
        parent: the parent of each of the n segments.
        positions: of each segment's K keys, the parent's first; padding is far in the future. One
            row serves all segments where their positions are equal.
    """

    gather: Gather
    num_parents: int
    parent: Int[Tensor, "n"]
    positions: Int[Tensor, "#n K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Segments of like length: ``num`` rows of ``length`` slots from slot ``start`` on."""

    start: int
    num: int
    length: int
    prefix: Prefix | None


class SegmentPlan:
    """The batches of segments of a microbatch.

    The masks of a plan are cached: the first layer that needs a mask makes it.

    Attributes:
        gather: moves tokens into the slots of all batches, one batch after the other.
        row: the microbatch as flex attention reads it; None on a CPU.
    """

    def __init__(
        self, gather: Gather, batches: tuple[Batch, ...], row: flex.FlatRow | None
    ) -> None:
        self.gather = gather
        self.batches = batches
        self.row = row
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = {}

    def mask(
        self, number: int, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "#n 1 Q K"] | None:
        """The additive mask of a batch; None where plain causal attention is right."""
        key = (number, window, dtype)
        if key not in self._masks:
            self._masks[key] = self._make_mask(self.batches[number], window, dtype)
        return self._masks[key]

    def _make_mask(
        self, batch: Batch, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "#n 1 Q K"] | None:
        if batch.prefix is not None:
            keys = batch.prefix.positions
        elif window is None or window >= batch.length:
            return None
        else:
            keys = torch.arange(batch.length, device=self.gather.tokens.device)[None]
        distance = keys[:, -batch.length :, None] - keys[:, None, :]
        # Padding is far in the future of all tokens, and sees itself.
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """The tokens of a segment as indices into the flattened microbatch, and its parent's number."""

    tokens: Int[IntArray, "L"]
    parent: int | None


def make_plan(
    positions: Int[IntArray, "B T"],
    segment_ids: Int[IntArray, "B T"],
    parent_ids: Int[IntArray, "B T"],
    device: torch.device,
) -> SegmentPlan:
    """The plan of a microbatch.

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
    row = None
    if device.type == "cuda":
        row = flex.make_flat_row(positions, segment_ids, parent_ids, device)
    return SegmentPlan(_make_gather(slots, positions.size, device), tuple(batches), row)


def _find_segments(
    segment_ids: Int[IntArray, "B T"], parent_ids: Int[IntArray, "B T"]
) -> list[_Segment]:
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
    """First by the class of the parent's length, parentless first; then long before short."""
    return _prefix_class(segments, index), -segments[index].tokens.size


def _prefix_class(segments: list[_Segment], index: int) -> int:
    """The class of the parent's length; lengths of one class are within the factor `_ALIKE`."""
    parent = segments[index].parent
    if parent is None:
        return -1
    return int(math.log(segments[parent].tokens.size) / -math.log(_ALIKE))


def _alike(segments: list[_Segment], first: int, other: int) -> bool:
    same_class = _prefix_class(segments, first) == _prefix_class(segments, other)
    sizes = segments[first].tokens.size, segments[other].tokens.size
    return same_class and sizes[1] >= _ALIKE * sizes[0]


def _aligned(
    runs: Iterable[Int[IntArray, "L"]], length: int, *, right: bool = False
) -> Int[IntArray, "n length"]:
    """Runs of indices as rows, padded with -1."""
    rows = []
    for run in runs:
        pad = np.full(length - run.size, -1, np.int32)
        rows.append(np.concatenate([pad, run] if right else [run, pad]))
    return np.stack(rows)


def _make_gather(slots: Int[IntArray, "slots"], num_tokens: int, device: torch.device) -> Gather:
    """The moves between tokens and slots, from the token of each slot (-1 for padding)."""
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
    segments: list[_Segment],
    run: list[int],
    positions: Int[IntArray, "N"],
    device: torch.device,
) -> Prefix | None:
    """The parents of a run of segments; None where the segments have none."""
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


class SegmentAttention:
    """An attention function of transformers; it remembers the layers that flex attention serves."""

    def __init__(self) -> None:
        self._served: dict[flex.LayerKind, bool] = {}

    def __call__(
        self,
        module: Any,
        query: Float[Tensor, "B heads T D"],
        key: Float[Tensor, "B key_heads T D"],
        value: Float[Tensor, "B key_heads T D"],
        attention_mask: Float[Tensor, "..."] | None,
        *,
        segments: SegmentPlan | None = None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "B T heads D"], None]:
        """Attention by segment; without ``segments`` transformers' own SDPA.

        With ``segments``, the shape of ``attention_mask`` tells the window (see `window_marks`).

        Raises:
            ValueError: the layer has an option that attention by segment does not know.
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
            flat = self._by_flex(segments.row, query, key, value, window, scaling)
            if flat is not None:
                return flat, None
        return attend_in_batches(segments, query, key, value, window, scaling), None

    def _by_flex(
        self,
        row: flex.FlatRow,
        query: Float[Tensor, "B heads T D"],
        key: Float[Tensor, "B key_heads T D"],
        value: Float[Tensor, "B key_heads T D"],
        window: int | None,
        scaling: float | None,
    ) -> Float[Tensor, "B T heads D"] | None:
        """Attention by flex attention; None for kinds of layers where it failed or differed."""
        heads, size = query.shape[1], query.shape[3]
        kind = flex.LayerKind(query.device, query.dtype, heads, key.shape[1], size, scaling)
        if kind not in self._served:
            self._settle(kind, flex.disagreement(kind, partial(both_ways, scaling)))
        if self._served[kind]:
            try:
                return flex.attend(row, query, key, value, window, scaling)
            except flex.compile_errors() as error:
                self._settle(kind, f"fails: {type(error).__name__}: {str(error)[:500]}")
        return None

    def _settle(self, kind: flex.LayerKind, reason: str | None) -> None:
        """Notes and logs that flex attention serves a kind of layer, or the reason why not."""
        self._served[kind] = reason is None
        if reason is None:
            log.info("attention by flex attention in %s", kind)
        else:
            log.warning("attention by batches in %s, since flex attention %s", kind, reason)


def both_ways(
    scaling: float | None,
    positions: Int[IntArray, "B T"],
    segment_ids: Int[IntArray, "B T"],
    parent_ids: Int[IntArray, "B T"],
    device: torch.device,
) -> tuple[flex.Attention, flex.Attention]:
    """Flex attention and attention by batches over a microbatch, to be compared."""
    row = flex.make_flat_row(positions, segment_ids, parent_ids, device)
    plan = make_plan(positions, segment_ids, parent_ids, device)
    return (
        lambda q, k, v, window: flex.attend(row, q, k, v, window, scaling),
        lambda q, k, v, window: attend_in_batches(plan, q, k, v, window, scaling),
    )


def attend_in_batches(
    segments: SegmentPlan,
    query: Float[Tensor, "B heads T D"],
    key: Float[Tensor, "B key_heads T D"],
    value: Float[Tensor, "B key_heads T D"],
    window: int | None,
    scaling: float | None,
) -> Float[Tensor, "B T heads D"]:
    """Attention by segment, one batch of segments at a time."""
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
        outputs.append(attend(q, k, v, mask, scaling).flatten(0, 1))
    together = segments.gather.back(torch.cat(outputs))
    return together.view(query.shape[0], query.shape[2], *together.shape[1:])


def _prompts(
    tokens: Float[Tensor, "N heads D"], prefix: Prefix
) -> Float[Tensor, "n length heads D"]:
    """The keys or values of each segment's parent."""
    parents = prefix.gather(tokens).view(prefix.num_parents, -1, *tokens.shape[1:])
    return parents.index_select(0, prefix.parent)


def attend(
    query: Float[Tensor, "n Q heads D"],
    key: Float[Tensor, "n K key_heads D"],
    value: Float[Tensor, "n K key_heads D"],
    mask: Float[Tensor, "#n 1 Q K"] | None,
    scaling: float | None,
) -> Float[Tensor, "n Q heads D"]:
    """Attention within one batch; key heads may be fewer than heads."""
    repeats = query.shape[2] // key.shape[2]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return cpu.attend(query, key, value, mask, scaling).transpose(1, 2)
    if repeats > 1:
        key, value = (
            t[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (key, value)
        )
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, is_causal=mask is None
    )
    return output.transpose(1, 2)


def window_marks(config: Any, like: Shaped[Tensor, "..."]) -> Any:
    """Tensors that a model passes to its layers as masks; their shape tells a layer its window.

    A model gives each kind of layer its own mask. So a mark of width window + 1 reaches the layers
    with a sliding window, and one of width 1 the others.
    """
    mark = like.new_zeros(1)
    windows = attention_windows(config)
    marks = {kind: mark.expand(1, 1, 1, (size or 0) + 1) for kind, size in windows.items()}
    return marks if len(marks) > 1 else next(iter(marks.values()))


def use_segments(model: Any) -> None:
    """Makes a model's layers call a `SegmentAttention`; their own attention must be SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, SegmentAttention())
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
