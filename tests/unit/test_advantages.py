from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.algorithm.advantages import group_advantages, has_signal
from tests import oracle

REWARD = st.one_of(st.none(), st.floats(-5, 5, allow_nan=False, width=32))


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("mean", "group", 0.8659),
        ("mean", "group_population", 1.0),
        ("mean", "none", 0.5),
        ("leave_one_out", "none", 0.6667),
        ("max_rl", "none", 1.0),
    ],
)
def test_published_numbers(baseline: str, scale: str, expected: float) -> None:
    got = group_advantages([[1.0, 0.0, 0.0, 1.0]], baseline=baseline, scale=scale)  # type: ignore[arg-type]
    # Four printed digits.
    assert got[0].tolist() == pytest.approx([expected, -expected, -expected, expected], abs=5e-5)


def test_batch_scales_by_hand() -> None:
    rewards = [[1.0, 0.0], [3.0, 3.0]]
    # All four rewards: mean 1.75, squares .5625 + 3.0625 + 1.5625 * 2 = 6.75, ddof 1: 2.25.
    batch = group_advantages(rewards, baseline="mean", scale="batch")
    assert batch.flatten().tolist() == pytest.approx(
        [0.5 / (1.5 + 1e-4), -0.5 / (1.5 + 1e-4), 0, 0], rel=1e-6
    )
    # Centred: .5, -.5, 0, 0: mean 0, squares .5, ddof 1: 1/6.
    centred = group_advantages(rewards, baseline="mean", scale="batch_centred")
    divisor = math.sqrt(0.5 / 3) + 1e-4
    assert centred.flatten().tolist() == pytest.approx([0.5 / divisor, -0.5 / divisor, 0, 0])


@given(
    st.lists(st.lists(REWARD, min_size=4, max_size=4), min_size=1, max_size=4),
    st.sampled_from(["mean", "leave_one_out", "max_rl"]),
    st.sampled_from(["none", "group", "group_population"]),
)
def test_equals_plain_python(rewards: list[list[float | None]], baseline: str, scale: str) -> None:
    tensor = torch.tensor([[math.nan if r is None else r for r in row] for row in rewards])
    got = group_advantages(tensor, baseline=baseline, scale=scale)  # type: ignore[arg-type]
    for row, advantages in zip(rewards, got.tolist(), strict=True):
        expected = oracle.advantages(row, baseline, scale)
        # float32 results of a float64 computation; population scaling divides by as little as 1e-8
        # and so amplifies the rounding of the mean.
        assert advantages == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=8), st.integers(-50, 50))
def test_mean_baseline_laws(values: list[int], shift: int) -> None:
    rewards = torch.tensor([[v / 10 for v in values]], dtype=torch.float64)
    plain = group_advantages(rewards, baseline="mean", scale="none")
    assert abs(float(plain.sum())) < 1e-5
    moved = group_advantages(rewards + shift, baseline="mean", scale="none")
    assert torch.allclose(plain, moved, atol=1e-5)
    scaled = group_advantages(rewards * 1000, baseline="mean", scale="group")
    base = group_advantages(rewards, baseline="mean", scale="group")
    # Invariant up to the epsilon, 1e-4 of a deviation that is at least 0.04 here unless it is 0.
    assert torch.allclose(base, scaled, rtol=3e-3, atol=1e-6)


def test_fewer_than_two_scores_teach_nothing() -> None:
    got = group_advantages([[1.0, math.nan, math.nan]], baseline="mean", scale="group")
    assert got.tolist() == [[0.0, 0.0, 0.0]]


def test_infinite_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        group_advantages([[1.0, math.inf]], baseline="mean", scale="none")


def test_signal() -> None:
    assert has_signal([1.0, 0.0], [True, True])
    assert not has_signal([1.0, 1.0], [True, True])
    assert not has_signal([1.0, None, None], [True, True, True])
    assert not has_signal([1.0, 0.0, 0.5], [False, False, True])
    assert has_signal([1.0, 0.0, 0.5], [False, True, True])
    assert not has_signal([1.0, 1.0 + 1e-9], [True, True])
