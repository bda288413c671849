"""The threshold of the top-entropy mask, over any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.algorithm.entropy import EntropyControl, entropy_threshold, top_entropy_mask


class Ranks:
    """Sums over threads that call it in step, as ranks do."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._values = [0.0] * size

    def total(self, rank: int, value: float) -> float:
        self._values[rank] = value
        self._barrier.wait()
        total = sum(self._values)
        self._barrier.wait()
        return total


def thresholds(parts: Sequence[Tensor], frac: float) -> list[float]:
    ranks, found = Ranks(len(parts)), [0.0] * len(parts)

    def run(rank: int) -> None:
        found[rank] = entropy_threshold(parts[rank], frac, lambda v: ranks.total(rank, v))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


ENTROPY = st.floats(0, 20, width=32)


@settings(deadline=None)
@given(st.lists(ENTROPY, min_size=1, max_size=40), st.floats(0.01, 1))
def test_it_is_an_order_statistic(values: list[float], frac: float) -> None:
    """TRL's rule: at least the (1 - frac) quantile, which interpolates; ties are kept."""
    entropies = torch.tensor(values)
    bar = entropy_threshold(entropies, frac)
    assert bar in values
    keep = int(round(frac * (len(values) - 1), 6)) + 1
    assert bar == sorted(values, reverse=True)[keep - 1]
    mask = top_entropy_mask(entropies[None], torch.ones(1, len(values), dtype=torch.bool), bar)
    assert int(mask.sum()) >= keep


@settings(deadline=None, max_examples=15)
@given(
    st.lists(ENTROPY, min_size=1, max_size=30),
    st.lists(st.integers(0, 2), min_size=30, max_size=30),
    st.floats(0.01, 1),
)
def test_it_does_not_depend_on_the_ranks(
    values: list[float], places: list[int], frac: float
) -> None:
    """A rank without tokens included."""
    parts = [
        torch.tensor([v for v, place in zip(values, places, strict=False) if place == rank])
        for rank in range(3)
    ]
    whole = entropy_threshold(torch.tensor(values), frac)
    assert thresholds(parts, frac) == [whole] * 3


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 1000).map(lambda n: n / 100), min_size=2, max_size=10),
    st.lists(st.integers(-2, 2), min_size=20, max_size=20),
    st.floats(0.01, 1),
)
def test_rounding_does_not_part_tokens_after_one_context(
    values: list[float], ulps: list[int], frac: float
) -> None:
    """Each value twice, as two rows would compute it: both are kept, or neither."""
    exact = torch.tensor(values * 2)
    noise = torch.tensor(ulps[: len(exact)]) * torch.finfo(torch.float32).eps
    entropies = exact * (1 + noise)
    every = torch.ones(1, len(exact), dtype=torch.bool)
    mask = top_entropy_mask(entropies[None], every, entropy_threshold(entropies, frac))[0]
    assert torch.equal(mask[: len(values)], mask[len(values) :])


def test_rounding_below_zero_and_nothing_at_all() -> None:
    assert entropy_threshold(torch.tensor([-1e-9, 0.5]), 1.0) == 0.0
    entropies, mask = torch.tensor([[-1e-9, 0.5]]), torch.ones(1, 2, dtype=torch.bool)
    assert top_entropy_mask(entropies, mask, 0.0).all()
    assert not top_entropy_mask(
        torch.zeros(1, 2), ~mask, entropy_threshold(torch.zeros(0), 0.5)
    ).any()


def test_the_coefficient_by_hand() -> None:
    control = EntropyControl(coef=0.0, target=0.5)
    assert control.applied == 0.0, "nothing was measured yet"
    control = control.after(0.5)
    assert (control.coef, control.applied) == (0.005, 0.005)
    control = control.after(0.6)
    assert (control.coef, control.applied) == (0.0, 0.0)
    control = control.after(0.6).after(0.4)
    assert control.coef == pytest.approx(0.005)
    control = EntropyControl(coef=0.02, target=0.5)
    assert control.applied == 0.0, "nothing was measured yet"
    control = control.after(0.6)
    assert (control.coef, control.applied) == (pytest.approx(0.015), 0.0)
