"""Sums over sequences, and statistics of what a loss saw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raygrpo.types import Stat

# Statistics by name that are computed when they are asked for: each waits for the device.
StatsLater = dict[str, Callable[[], Stat]]


def sequence_means(values: Tensor, mask: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Means over each sequence's trained tokens [S], and their numbers [S]; gradients pass.

    A sequence is a completion, wherever its tokens lie: several may share a row.

    Args:
        values, mask: [B, T]; ``values`` must be finite where ``mask`` is False.
        sequences: [B, T] ids from 0.
    """
    size = int(sequences.max()) + 1 if sequences.numel() else 0
    flat, index = (values * mask).flatten(), sequences.flatten()
    sums = torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, flat)
    ones = mask.to(values.dtype).flatten()
    counts = torch.zeros_like(sums).index_add(0, index, ones)
    return sums / counts.clamp(min=1), counts


def stat(values: Tensor, mask: Tensor) -> Stat:
    """Sum, count, smallest and largest of the values where ``mask`` is True."""
    chosen = values.detach()[mask].double()
    if not chosen.numel():
        return Stat(sum=0.0, count=0.0, min=float("inf"), max=float("-inf"))
    low, high = torch.aminmax(chosen)
    total, least, most = torch.stack([chosen.sum(), low, high]).tolist()
    return Stat(sum=total, count=float(chosen.numel()), min=least, max=most)


def sequence_stat(values: Tensor, mask: Tensor, sequences: Tensor) -> Stat:
    """A statistic of the sequences' means; sequences without trained tokens are in none."""
    means, counts = sequence_means(values.detach(), mask, sequences)
    return stat(means, counts > 0)
