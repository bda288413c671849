"""A microbatch as the tensors that the policy's network reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.algorithm.logprobs import ExpectedGrad
from raygrpo.learner.attention.segments import SegmentPlan, make_plan
from raygrpo.types import IntArray, Microbatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from raygrpo.algorithm.shapes import BoolBT, IntBT, IntN


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """The part of a microbatch that `PolicyModel` reads, on its device.

    A microbatch without trained tokens names one untrained token, so that every microbatch passes
    through the whole network: under ZeRO-3 all ranks must take the same path.

    Attributes:
        rows, columns: where the N trained tokens lie.
        predictors: the column whose hidden state predicts each trained token.
        tree: None where plain causal attention is exact.
        expected_grad: the gradients that the loss will give to the N tokens, where they are known.
    """

    token_ids: IntBT
    loss_mask: BoolBT
    rows: IntN
    columns: IntN
    predictors: IntN
    tree: TreeLayout | None
    expected_grad: ExpectedGrad | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeLayout:
    """Positions, segments and parent segments of rows with more than one segment.

    Example: a prompt of 2 tokens with completions of 2 and 1 has ``positions`` [[0, 1, 2, 3, 2]],
    ``segment_ids`` [[0, 0, 1, 1, 2]] and ``parent_ids`` [[-1, -1, 0, 0, 0]].
    """

    positions: IntBT
    segment_ids: IntBT
    parent_ids: IntBT
    plan: SegmentPlan

    def allowed(self) -> Bool[Tensor, "B T T"]:
        """Which key (last axis) a query sees: own and parent segment, up to its position."""
        query, key = self.segment_ids[:, :, None], self.segment_ids[:, None, :]
        related = (query == key) | (self.parent_ids[:, :, None] == key)
        causal = self.positions[:, None, :] <= self.positions[:, :, None]
        return related & causal & (query >= 0) & (key >= 0)


def policy_inputs(microbatch: Microbatch, device: torch.device) -> PolicyInputs:
    """The arrays of a microbatch as tensors on ``device``."""
    rows, columns = np.nonzero(microbatch.loss_mask)
    if not rows.size:
        rows = columns = np.zeros(1, np.int64)
    tree = None
    if not _is_plain(microbatch):
        tree = tree_layout(
            microbatch.positions, microbatch.segment_ids, microbatch.parent_ids, device
        )
    return PolicyInputs(
        token_ids=_tensor(microbatch.token_ids, device),
        loss_mask=torch.tensor(microbatch.loss_mask, device=device),
        rows=_tensor(rows, device),
        columns=_tensor(columns, device),
        predictors=_tensor(microbatch.predictors[rows, columns], device),
        tree=tree,
    )


def tree_layout(
    positions: Int[IntArray, "B T"],
    segment_ids: Int[IntArray, "B T"],
    parent_ids: Int[IntArray, "B T"],
    device: torch.device,
) -> TreeLayout:
    """The layout of a microbatch's arrays, on ``device``."""
    return TreeLayout(
        positions=_tensor(positions, device).clamp(min=0),
        segment_ids=_tensor(segment_ids, device),
        parent_ids=_tensor(parent_ids, device),
        plan=make_plan(positions, segment_ids, parent_ids, device),
    )


def _tensor(array: Any, device: torch.device) -> Int[Tensor, "*shape"]:
    return torch.tensor(array, dtype=torch.long, device=device)


def _is_plain(microbatch: Microbatch) -> bool:
    """One segment per row, from column 0, padded on the right: causal attention needs no mask."""
    real = microbatch.segment_ids >= 0
    counted = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    alone = microbatch.segment_ids == microbatch.segment_ids[:, :1]
    return bool(
        (microbatch.parent_ids < 0).all()
        and (alone | ~real).all()
        and (microbatch.positions == counted)[real].all()
        and (real == (counted < real.sum(1, keepdims=True))).all()
    )
