from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from raygrpo.algorithm.advantages import (
    batch_normalised,
    group_advantages,
    has_signal,
    normalised_sum,
)
from raygrpo.algorithm.ledger import TokenLedger
from raygrpo.algorithm.overlong import overlong_penalty
from raygrpo.algorithm.step_plan import (
    make_step_batch,
    num_trained_tokens,
    signal_values,
    teaches,
)
from raygrpo.algorithm.window import Window
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from raygrpo.rewards.text import length
from raygrpo.types import FinishedGroup, GroupSummary, Score
from tests import builders, oracle
from tests.builders import request, summary

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
    assert got.dtype == torch.float32
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


def test_a_group_of_one_score_is_in_no_deviation() -> None:
    """Its centred reward is 0 by necessity, which would make the batch look more alike."""
    rewards = torch.tensor([[1.0, 0.0], [5.0, math.nan]])
    found = group_advantages(rewards, baseline="mean", scale="batch_centred")
    size = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert found.flatten().tolist() == pytest.approx([size, -size, 0.0, 0.0])


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


def test_max_rl_without_success_teaches_nothing() -> None:
    assert group_advantages(
        [[0.0, 0.0], [-1.0, 1.0]], baseline="max_rl", scale="none"
    ).tolist() == [
        [0.0, 0.0],
        [0.0, 0.0],
    ]
    # The mean of 1, 0, 0, 0 is 1/4: (1 - 1/4) / (1/4), and -1.
    rare = group_advantages([[1.0, 0.0, 0.0, 0.0]], baseline="max_rl", scale="none")
    assert rare.tolist() == [[3.0, -1.0, -1.0, -1.0]]


def test_soft_overlong_penalty_by_hand() -> None:
    """DAPO, equation 13, with its own lengths: 20480 tokens, the last 4096 of them penalised."""
    expected = {16384: 0.0, 16385: -1 / 4096, 18432: -0.5, 20480: -1.0, 20481: -1.0, 1: 0.0}
    for length_, penalty in expected.items():
        assert overlong_penalty(length_, 20480, 4096) == penalty
    assert length([[0] * 9, [0] * 7, [0] * 5], max_length=8, buffer=2) == [-1.0, -0.5, 0.0]


def test_the_plan_takes_the_overlong_penalty_off() -> None:
    """In the advantages and in what has signal; a completion without a score stays without."""
    config = builders.config(
        sampling={"max_tokens": 10},
        advantage={"overlong_buffer": 0.4},
        train={"groups_per_step": 1},
    )
    alike = summary(0, [1.0, 1.0, None], lengths=[10, 7, 10])
    assert signal_values(alike, config) == [0.0, 0.75, None]
    batch = make_step_batch(0, [held(alike, config)], config)
    assert batch.has_signal
    assert [sample.advantage for sample in batch.minibatches[0]] == [-0.375, 0.375]
    plain = builders.config()
    assert signal_values(alike, plain) == [1.0, 1.0, None]


def configured(scale: str = "none", baseline: str = "mean", **advantage: object) -> RunConfig:
    advantage |= {"scale": scale, "baseline": baseline}
    return builders.config(
        rewards=[{"func": "exact", "name": "r"}],
        sampling={"max_tokens": 10},
        loss={"aggregation": "sequence"},
        advantage=advantage,
        train={"groups_per_step": 2},
    )


@pytest.mark.parametrize(
    ("scale", "buffer"),
    [
        ("none", 0.0),
        ("none", 0.4),
        ("group", 0.4),
        ("batch", 0.0),
        ("batch_centred", 0.4),
        ("gdpo", 0.0),
    ],
)
def test_truncated_completions_can_be_left_out_of_the_baseline(scale: str, buffer: float) -> None:
    """The rest has the advantages that it has without them, whatever their rewards, and as many
    sequences in its denominator."""
    config = configured(scale, mask_truncated="exclude", overlong_buffer=buffer)
    whole = summary(
        0,
        [1.0, 0.0, 5.0, 1.0, None],
        lengths=[3, 7, 10, 2, 10],
        finishes=["stop", "stop", "length", "stop", "length"],
    )
    rest = summary(0, [1.0, 0.0, 1.0], lengths=[3, 7, 2])
    other = summary(1, [0.0, 2.0])
    batches = []
    for first in (whole, rest):
        groups = [held(s, config) for s in (first, other)]
        batches.append(make_step_batch(0, groups, config))
    assert batches[0].has_signal
    ours, expected = (batch.minibatches[0] for batch in batches)
    assert [s.completion_index for s in ours] == [0, 1, 3, 0, 1]
    assert [s.advantage for s in ours] == [s.advantage for s in expected]
    assert sum(s.advantage for s in ours) == pytest.approx(0, abs=1e-6)
    # Six have a score, the truncated one among them; each is a mean over its tokens.
    assert [s.loss_weight for s in ours] == pytest.approx([1 / (6 * n) for n in (3, 7, 2, 4, 4)])
    trained = [num_trained_tokens(whole, i, config.advantage) for i in range(5)]
    ledger = TokenLedger().report(whole).take(whole, trained)
    assert (ledger.trained, ledger.masked, ledger.unexplained(0)) == (12, 20, 0)


@pytest.mark.parametrize(
    ("mask_truncated", "signal"), [(False, True), (True, True), ("exclude", False)]
)
def test_a_truncated_completion_left_out_gives_no_signal(
    mask_truncated: bool | str, signal: bool
) -> None:
    """Only its reward differs; with `true` it still moves the others' baseline."""
    config = configured(mask_truncated=mask_truncated)
    group = summary(0, [1.0, 1.0, 0.0], finishes=["stop", "stop", "length"])
    assert teaches(group, config) is signal
    alone = summary(0, [1.0, 0.0, 0.5], finishes=["stop", "length", "length"])
    assert teaches(alone, config) is signal


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


def trl_normalise_then_sum(parts: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """TRL's GRPOTrainer with ``multi_objective_aggregation="normalize_then_sum"``, parts [N, G, K].

    The lines of `_generate_and_score_completions` on its own `nanstd`, rows flattened as there.
    """
    flat = parts.reshape(-1, parts.shape[2])
    unscorable = torch.isnan(flat).all(dim=1)
    mean_k = torch.nanmean(parts, dim=1, keepdim=True)
    std_k = nanstd(parts, dim=1, keepdim=True)
    reward_k = ((parts - mean_k) / (std_k + 1e-4)).view(-1, parts.shape[2])
    rewards = (reward_k * torch.tensor(weights, dtype=parts.dtype)).nansum(dim=1)
    rewards[unscorable] = torch.nan
    advantages = (rewards - torch.nanmean(rewards)) / (nanstd(rewards).expand_as(rewards) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).view(parts.shape[:2])


def test_normalise_then_sum_by_hand() -> None:
    # Reward a of the first group: mean 1/2, squares 4 * 1/4, ddof 1: deviation sqrt(1/3).
    # Reward b: 0 and 10 in turn: mean 5, squares 4 * 25, deviation sqrt(100/3).
    parts = [[[1.0, 0.0], [0.0, 10.0], [0.0, 0.0], [1.0, 10.0]], [[1.0, 5.0]] * 4]
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    b = 5.0 / (math.sqrt(100 / 3) + 1e-4)
    sums = normalised_sum(parts, [1.0, 0.5])
    first = [a - b / 2, -a + b / 2, -a - b / 2, a + b / 2]
    assert sums[0].tolist() == pytest.approx(first, rel=1e-12)
    assert sums[1].tolist() == [0.0] * 4
    # The step: eight values, four of them 0; their mean is 0.
    deviation = math.sqrt(sum(x * x for x in first) / 7)
    got = batch_normalised(sums)
    # float32 results.
    assert got[0].tolist() == pytest.approx([x / (deviation + 1e-4) for x in first], rel=1e-6)
    assert got[1].tolist() == [0.0] * 4


PARTS = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.lists(st.lists(REWARD, min_size=k, max_size=k), min_size=4, max_size=4),
        min_size=1,
        max_size=3,
    )
)


def as_tensor(parts: list[list[list[float | None]]]) -> torch.Tensor:
    return torch.tensor(
        [[[math.nan if p is None else p for p in row] for row in group] for group in parts],
        dtype=torch.float64,
    )


@settings(deadline=None)  # the clock of a busy machine decides nothing
@given(PARTS)
def test_normalise_then_sum_is_trls(parts: list[list[list[float | None]]]) -> None:
    tensor = as_tensor(parts)
    weights = [1.0, -0.5, 2.0][: tensor.shape[2]]
    scored = (~torch.isnan(tensor)).any(2)
    # TRL gives a completion that is alone with a score the sum 0; here it is in no mean.
    assume(bool((scored.sum(1) != 1).all()))
    got = batch_normalised(normalised_sum(tensor, weights)).double()
    expected = trl_normalise_then_sum(tensor, weights)
    # Both in float64, then float32 here; the two divisions by 1e-4 amplify the rounding of means
    # that should cancel (1e-16 * 5) to 5e-8 at most.
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(PARTS, st.integers(-40, 40))
def test_normalise_then_sum_laws(parts: list[list[list[float | None]]], shift: int) -> None:
    tensor = as_tensor(parts)
    weights = [1.0, 0.5, 2.0][: tensor.shape[2]]
    sums = normalised_sum(tensor, weights)
    # Each z is at most (G - 1) / sqrt(G) = 1.5; sums over a group cancel, None parts or not.
    scored = ~torch.isnan(sums)
    assert float(sums.nan_to_num().sum(1).abs().max()) < 1e-9
    assert bool((scored == ((~torch.isnan(tensor)).any(2) & (scored.any(1, keepdim=True)))).all())
    # A reward may be shifted; another group does not matter before the step's normalisation.
    moved = normalised_sum(tensor + shift, weights)
    assert torch.allclose(sums.nan_to_num(), moved.nan_to_num(), atol=1e-6)
    assert torch.equal(normalised_sum(tensor[:1], weights).nan_to_num(), sums[:1].nan_to_num())


def test_normalise_then_sum_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="must be"):
        normalised_sum([[[1.0], [2.0]]], [1.0, 1.0])
    with pytest.raises(ValueError, match="infinite"):
        normalised_sum([[[math.inf], [2.0]]], [1.0])
    alone = normalised_sum([[[1.0], [math.nan]], [[1.0], [0.0]]], [1.0])
    assert torch.isnan(alone[0]).all() and not torch.isnan(alone[1]).any()


def held(of: GroupSummary, config: RunConfig) -> FinishedGroup:
    """A finished group as the pool hands it to the trainer."""
    return FinishedGroup(summary=of, payload=f"ref-{of.group_id}", teaches=teaches(of, config))


def several(group_id: int, parts: list[dict[str, float | None] | str]) -> GroupSummary:
    """A group of several rewards with weights 1; text is an error."""
    plain = summary(group_id, [0.0] * len(parts))
    scores = tuple(
        Score(value=None, parts={"a": 9.0, "b": None}, error=part)
        if isinstance(part, str)
        else Score(value=sum(p for p in part.values() if p is not None), parts=part)
        for part in parts
    )
    return replace(plain, scores=scores)


def gdpo_config(weight_a: float, groups: int = 1) -> RunConfig:
    return builders.config(
        rewards=[
            {"func": "exact", "name": "a", "weight": weight_a},
            {"func": "number", "name": "b"},
        ],
        advantage={"scale": "gdpo"},
        train={"groups_per_step": groups},
    )


def test_the_plan_normalises_each_reward() -> None:
    config = gdpo_config(2.0, groups=2)
    groups = [
        several(0, [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 4.0}, {"a": 0.0, "b": None}, "failed"]),
        several(1, [{"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 3.0}, {"a": 0.0, "b": 2.0}, "failed"]),
    ]
    batch = make_step_batch(0, [held(group, config) for group in groups], config)
    (samples,) = batch.minibatches
    nan = math.nan
    # The errored completion's other part (9.0) counts nowhere.
    parts = torch.tensor(
        [
            [[1.0, 0.0], [0.0, 4.0], [0.0, nan], [nan, nan]],
            [[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [nan, nan]],
        ],
        dtype=torch.float64,
    )
    expected = trl_normalise_then_sum(parts, [2.0, 1.0])[:, :3].flatten().tolist()
    assert [s.completion_index for s in samples] == [0, 1, 2, 0, 1, 2]
    assert [s.advantage for s in samples] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert batch.has_signal


@pytest.mark.parametrize(
    ("weight_a", "parts", "signal"),
    [
        # 3 * a + b is 3 for all, but normalised, a weighs three times b.
        (3.0, [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 3.0}], True),
        # a + b is 1 for all, and normalised the two cancel as well.
        (1.0, [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}], False),
    ],
)
def test_window_and_plan_agree_on_signal(
    weight_a: float, parts: list[dict[str, float | None] | str], signal: bool
) -> None:
    config = gdpo_config(weight_a)
    group = held(several(0, parts), config)
    weighted = [weight_a * s.parts["a"] + s.parts["b"] for s in group.summary.scores]  # type: ignore[operator]
    assert max(weighted) == min(weighted), "the plain sum teaches nothing"
    assert make_step_batch(0, [group], config).has_signal is signal
    window = Window(steps=1, groups_per_step=1, max_refills=2)
    window.admit(request(0))
    (decided,) = window.finish(group)
    assert decided.fate == ("kept" if signal else "no_signal")


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [([1.0, 0.0], True), ([1.0, -1.0], False), ([0.0, -2.0], False), ([2.0, -1.0], True)],
)
def test_a_group_without_success_has_no_signal_for_max_rl(
    rewards: list[float], signal: bool
) -> None:
    """A mean that is not positive makes all its advantages 0, as equal rewards do."""
    group = summary(0, rewards)
    found = group_advantages([rewards], baseline="max_rl", scale="none")
    assert bool(found.any()) is signal
    assert has_signal(rewards, [True, True], "max_rl") is signal
    assert teaches(group, configured(baseline="max_rl")) is signal
    assert teaches(group, configured())


def test_other_baselines_beside_it_are_refused() -> None:
    for other in ("leave_one_out", "max_rl"):
        with pytest.raises(ConfigError, match="gdpo subtracts means"):
            builders.config(advantage={"scale": "gdpo", "baseline": other})
