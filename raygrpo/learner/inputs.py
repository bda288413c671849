"""What the policy's network is given: a microbatch as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.algorithm.logprobs import TokenGradient
from raygrpo.learner.attention.segments import SegmentPlan, make_plan
from raygrpo.types import IntArray, Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """What `PolicyModel` reads of a microbatch, on its device.

    ``token_ids`` and ``loss_mask`` are [B, T]. ``rows``, ``columns`` and ``predictors`` [N] name
    the N trained tokens and the column whose hidden state predicts each; without any, they name one
    untrained token, so that every microbatch passes through all of the network (under ZeRO-3 ranks
    must take the same path). ``tree`` is None where plain causal attention is exact.
    ``token_gradient`` foretells what the loss gives each of the N tokens as gradient.
    """

    token_ids: Tensor
    loss_mask: Tensor
    rows: Tensor
    columns: Tensor
    predictors: Tensor
    tree: TreeLayout | None
    token_gradient: TokenGradient | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeLayout:
    """Positions, segments and their parents [B, T] of rows with more than one segment."""

    positions: Tensor
    segment_ids: Tensor
    parent_ids: Tensor
    plan: SegmentPlan

    def allowed(self) -> Tensor:
        """[B, Q, K]: a token sees its own and its parent's segment, up to its position."""
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
    positions: IntArray, segment_ids: IntArray, parent_ids: IntArray, device: torch.device
) -> TreeLayout:
    """The layout of a microbatch's arrays [B, T]."""
    return TreeLayout(
        positions=_tensor(positions, device).clamp(min=0),
        segment_ids=_tensor(segment_ids, device),
        parent_ids=_tensor(parent_ids, device),
        plan=make_plan(positions, segment_ids, parent_ids, device),
    )


def _tensor(array: Any, device: torch.device) -> Tensor:
    return torch.tensor(array, dtype=torch.long, device=device)


def _is_plain(microbatch: Microbatch) -> bool:
    """One segment a row, from column 0, padded on the right: causal attention needs no mask."""
    real = microbatch.segment_ids >= 0
    counted = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    alone = microbatch.segment_ids == microbatch.segment_ids[:, :1]
    return bool(
        (microbatch.parent_ids < 0).all()
        and (alone | ~real).all()
        and (microbatch.positions == counted)[real].all()
        and (real == (counted < real.sum(1, keepdims=True))).all()
    )
