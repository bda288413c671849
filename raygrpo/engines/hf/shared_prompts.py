"""Attention on a CPU for a group that has one copy of its prompt, read once for all rows.

Attention over the prompt and over a row's own completion are two calls of torch's flash kernel. In
the first call the rows of a group are queries of one problem. The kernel also returns the logarithm
of each query's sum of exponentials, which gives the weights of the two outputs (FlashAttention's
rule for blocks of keys, Dao et al. 2022, arXiv:2205.14135, section 3.1; for shared prefixes
Juravsky et al. 2024, arXiv:2402.05099). So the time of a step and the memory of the cache grow with
the tokens of the prompts, not with these tokens times the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raygrpo.models import refuse_unknown

if TYPE_CHECKING:
    from raygrpo.engines.hf.cache import SlotLayer

NAME = "raygrpo_shared_prompts"
_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
Indices = npt.NDArray[np.int64]
# A group that saves fewer positions than this loses more by adding up two outputs. A single row
# saves nothing itself, but would make all other rows look past its long prompt.
SHARING_PAYS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """The prompts in slots that the rows of one decode step read; the same for all layers.

    A mask of this step covers the ``length`` positions of the slots, then the positions of rows.

    Attributes:
        layers: the cache of the slots.
        num_slots: the number of slots in use, which are the first ones.
        length: the length of the longest prompt in a slot.
        order: two index arrays. ``members`` [slots * M] lists the rows of each slot, filled up to
            the M rows of the largest slot; ``places`` [rows] is each row's place in the list. None
            if the list is 0, 1, 2, ...
        alone: [rows], True for a row whose prompt is in no slot; None if there is no such row.
        masks: a cache by the address of a whole mask and the number of heads a key: this mask, its
            part for slots (None if all is visible) and its part for rows.
    """

    layers: Sequence[SlotLayer]
    num_slots: int
    length: int
    order: tuple[Tensor, Tensor] | None
    alone: Tensor | None
    masks: dict[tuple[int, int], tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict)

    def split(self, mask: Tensor, repeats: int) -> tuple[Tensor | None, Tensor]:
        """The mask's parts for slots and for rows, in layers whose keys serve ``repeats`` heads."""
        known = (mask.data_ptr(), repeats)
        if known not in self.masks:
            of_slots, own = mask[..., : self.length], mask[..., self.length :].contiguous()
            taken: Tensor | None = None
            if not self._sees_all(of_slots):
                taken = self.by_slot(of_slots.expand(-1, 1, repeats, -1))
            self.masks[known] = mask, taken, own
        return self.masks[known][1:]

    def by_slot(self, rows: Tensor) -> Tensor:
        """[R, heads, n, ...] to [slots, heads, members * n, ...]."""
        if self.order is not None:
            rows = rows.index_select(0, self.order[0])
        apart = rows.view(self.num_slots, -1, *rows.shape[1:])
        return apart.transpose(1, 2).flatten(2, 3)

    def by_row(self, slots: Tensor, repeats: int) -> Tensor:
        """[slots, heads, members * repeats, ...] to [R, heads, repeats, ...]."""
        apart = slots.view(*slots.shape[:2], -1, repeats, *slots.shape[3:])
        rows = apart.transpose(1, 2).flatten(0, 1)
        return rows if self.order is None else rows.index_select(0, self.order[1])

    def _sees_all(self, mask: Tensor) -> bool:
        if self.alone is not None:
            mask = mask[~self.alone]
        return bool((mask == 0).all())


def sharing_pays(prompt_length: int, num_rows: int) -> bool:
    """Whether a group's rows should share one copy of their prompt."""
    return prompt_length * max(num_rows - 1, 1) >= SHARING_PAYS


def share_prompts(
    layers: Sequence[SlotLayer], slots: Indices, bases: Indices
) -> SharedPrompts | None:
    """The prompts of rows whose first ``bases`` [R] positions lie in ``slots`` [R].

    The slot -1 is none. Returns None if no row has a slot.
    """
    shared = slots >= 0
    if not shared.any():
        return None
    num_slots = int(slots.max()) + 1
    rows = np.argsort(slots, kind="stable")[(~shared).sum() :]
    counts = np.bincount(slots[shared], minlength=num_slots)
    starts = np.cumsum(counts) - counts
    width = int(counts.max())
    places = np.zeros(slots.size, np.int64)
    places[rows] = slots[rows] * width + np.arange(rows.size) - starts[slots[rows]]
    members = np.full(num_slots * width, rows[0])
    members[places[rows]] = rows
    as_they_are = np.array_equal(members, np.arange(slots.size))
    order = None if as_they_are else (torch.from_numpy(members), torch.from_numpy(places))
    return SharedPrompts(
        layers=layers,
        num_slots=num_slots,
        length=int(bases.max()),
        order=order,
        alone=None if shared.all() else torch.from_numpy(~shared),
    )


def shared_prompt_attention(
    module: Any,
    query: Tensor,  # [R, heads, 1, D]
    key: Tensor,  # [R, key heads, own positions, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompts: SharedPrompts | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; without ``prompts`` its own SDPA.

    Raises:
        ValueError: the layer has unknown options, no mask, or no keys of its own.
    """
    if prompts is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return plain
    refuse_unknown(options, "shared prompts")
    layer = prompts.layers[module.layer_idx]
    if attention_mask is None or not layer.is_initialized:
        raise ValueError("the layer has no mask or no keys of its own")
    rows, heads, _, width = query.shape
    repeats = heads // key.shape[1]
    mask, own_mask = prompts.split(attention_mask, repeats)
    # Heads that share keys become queries of one head.
    query = query.reshape(rows, -1, repeats, width)
    own, own_sums = attend(query, key, value, own_mask, scaling)
    keys, values = (t[: prompts.num_slots, :, : prompts.length] for t in (layer.keys, layer.values))
    shared, sums = attend(prompts.by_slot(query), keys, values, mask, scaling)
    shared, sums = prompts.by_row(shared, repeats), prompts.by_row(sums, repeats)
    if prompts.alone is not None:
        # These rows read another group's prompt, which may give NaN.
        sums = sums.masked_fill(prompts.alone[:, None, None], -torch.inf)
        shared = shared.masked_fill(prompts.alone[:, None, None, None], 0)
    weight = (sums - own_sums).sigmoid_()[..., None]
    output = torch.lerp(own.float(), shared.float(), weight).to(query.dtype)
    return output.view(rows, 1, heads, width), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs [n, heads, Q, D] and logarithms [n, heads, Q] of the sums of exponentials."""
    found: tuple[Tensor, Tensor] = _flash_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )
    return found


def use_shared_prompts(model: Any) -> None:
    """Makes a model's layers call `shared_prompt_attention`; its own attention must be SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, shared_prompt_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
