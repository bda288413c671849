"""Distances between tensors, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def relative(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((ours - expected).norm() / expected.norm())


def as_vector(tensors: Iterable[Tensor]) -> Tensor:
    """All of them as one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def relative_weights(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """`relative` of all weights as one vector, in float64; their names must be the same."""
    assert list(ours) == list(expected)
    return relative(as_vector(ours.values()).double(), as_vector(expected.values()).double())
