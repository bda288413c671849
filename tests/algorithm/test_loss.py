"""The losses against an oracle in plain Python, and the laws of docs/algorithms.md."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.algorithm.loss import LossConfig, LossInputs, loss_weights_for, policy_loss
from raygrpo.tracking.metrics import stat_metrics
from tests import oracle
from tests.algorithm.loss_cases import (
    AGGREGATIONS,
    BESIDE,
    CASES,
    CORRECTIONS,
    LAYOUTS,
    LOSSES,
    Layout,
    Places,
    config_of,
    gradients_of,
    make_inputs,
    make_sequences,
    options_for,
    sides_of,
    weights_of,
    with_policy_mask,
)
from tests.oracle import Sequence_

ALL = [(loss, beside, aggregation) for loss, beside in CASES for aggregation in AGGREGATIONS]


@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_equal_the_oracle(loss: str) -> None:
    """Every loss, with all that acts beside it, in every aggregation."""
    for number, (name, beside, aggregation) in enumerate(ALL):
        if name != loss:
            continue
        sequences = make_sequences(number)
        options = options_for(loss, beside, aggregation)
        order = list(range(len(sequences)))
        inputs, places = make_inputs(
            sequences, weights_of(sequences, aggregation), order, LAYOUTS[number % 3]
        )
        config = config_of(options)
        inputs = with_policy_mask(inputs, oracle.entropy_bar(sequences, config.top_entropy_frac))
        value, _ = policy_loss(inputs, config)
        # Weights are float32: 1e-7 relative each, of terms about 1 that cancel.
        expected = oracle.loss(sequences, **options)
        assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-7), (beside, aggregation)
        value.backward()
        for got, sequence in zip(gradients_of(inputs, places, sequences), sequences, strict=True):
            wanted = numeric_gradient(sequence, sequences, options)
            # Central differences of step 1e-6 are good to about 1e-8 here, kinks aside: at these
            # seeds none lies within a step of one.
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-7), (beside, aggregation)
        outside = ~inputs.loss_mask
        for values in (inputs.logprobs, inputs.entropies):
            if values is not None and values.grad is not None:
                assert not values.grad[outside].any()


def numeric_gradient(
    sequence: Sequence_, sequences: list[Sequence_], options: dict[str, Any]
) -> Tensor:
    """By each logprob and each entropy of a sequence; exactly 0 where it is not trained."""
    step = 1e-6
    found = torch.zeros(2, len(sequence.new), dtype=torch.float64)
    for row, values in enumerate((sequence.new, sequence.entropy)):
        for t, trained in enumerate(sequence.mask):
            if not trained:
                continue
            center = values[t]
            ends = []
            for sign in (1, -1):
                values[t] = center + sign * step
                ends.append(oracle.loss(sequences, **options))
            values[t] = center
            found[row, t] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_split_order_and_layout_do_not_matter(loss: str, aggregation: str, seed: int) -> None:
    """Law 1: one padded batch against microbatches (of any rank) of any rows in any order.

    Every loss in every aggregation, and each example with all that may stand beside the loss.
    """
    # All from the seed: hypothesis would begin with one microbatch of padded rows each time.
    rng = random.Random(f"{loss} {aggregation} {seed}")
    count = rng.randint(3, 7)
    sequences = make_sequences(rng.randrange(10**6), count)
    weights = weights_of(sequences, aggregation)
    order = list(range(count))
    whole = make_inputs(sequences, weights, order)
    rng.shuffle(order)
    edges = [0, *sorted(rng.sample(range(1, count), rng.randint(1, 2))), count]
    parts = [
        make_inputs(
            sequences,
            weights,
            order[start:stop],
            rng.choice(LAYOUTS),
        )
        for start, stop in pairwise(edges)
    ]
    for beside in sides_of(loss):
        config = config_of(options_for(loss, beside, aggregation))
        # The mask of top entropies is that of the whole update.
        bar = oracle.entropy_bar(sequences, config.top_entropy_frac)
        expected, wanted = trained([whole], sequences, config, bar)
        total, got = trained(parts, sequences, config, bar)
        # float64 sums in another order.
        assert total == pytest.approx(expected, rel=1e-9, abs=1e-12), beside
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), beside


def trained(
    parts: Sequence[tuple[LossInputs, Places]],
    sequences: list[Sequence_],
    config: LossConfig,
    bar: float,
) -> tuple[float, list[Tensor]]:
    """The sum of the parts' losses, and each sequence's gradients; ``bar`` is of entropies."""
    total, got = 0.0, {}
    for inputs, places in parts:
        for values in (inputs.logprobs, inputs.entropies):
            assert values is not None
            values.grad = None
        value, _ = policy_loss(with_policy_mask(inputs, bar), config)
        value.backward()
        total += value.item()
        got |= dict(zip(sorted(places), gradients_of(inputs, places, sequences), strict=True))
    return total, [got[index] for index in range(len(sequences))]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    loss=st.sampled_from(sorted(LOSSES)),
    aggregation=st.sampled_from(AGGREGATIONS),
    layout=st.sampled_from(LAYOUTS),
)
def test_at_ratio_one_every_loss_has_reinforces_gradient(
    seed: int, loss: str, aggregation: str, layout: Layout
) -> None:
    """Law 2, whatever the ratio is to; sapo's 4 / tau and dppo's pull are made for it."""
    sequences = make_sequences(seed)
    inputs, _ = make_inputs(
        sequences, weights_of(sequences, aggregation), list(range(len(sequences))), layout
    )
    same = inputs.logprobs.detach().clone()
    anchored = config_of(options_for(loss, "alone", aggregation)).anchored_at_sampler
    here = replace(inputs, old_logprobs=None, sampler_logprobs=same if anchored else None)
    value, stats = policy_loss(here, config_of(options_for(loss, "alone", aggregation)))
    value.backward()
    index = inputs.sequence_ids.clamp(min=0)
    expected = -(inputs.advantages[index] * inputs.loss_weights[index]) * inputs.loss_mask
    assert inputs.logprobs.grad is not None
    assert torch.allclose(inputs.logprobs.grad, expected, rtol=1e-9, atol=1e-15)
    assert stats["ratio"].min == stats["ratio"].max == 1.0
    if "clip_ratio/region_mean" in stats:
        assert stats["clip_ratio/region_mean"].mean == 0.0


@pytest.mark.parametrize("beside", CORRECTIONS)
@pytest.mark.parametrize("loss", ["clip", "cispo", "sapo", "reinforce"])
def test_a_correction_is_a_factor_without_gradient(loss: str, beside: str) -> None:
    """Law 2 in the only update of a batch, whose old logprobs are the policy's own."""
    sequences = make_sequences(3)
    for sequence in sequences:
        sequence.old = list(sequence.new)
    weights = weights_of(sequences, "token")
    inputs, places = make_inputs(sequences, weights, list(range(len(sequences))), "packed")
    config = config_of(options_for(loss, beside, "token"))
    policy_loss(replace(inputs, old_logprobs=None), config)[0].backward()
    bounds = (config.correction_min, config.correction_max)
    for index, gradient in enumerate(gradients_of(inputs, places, sequences)):
        one = sequences[index]
        expected = [
            -one.advantage
            * weights[index].item()
            * oracle.correction_token(one, t, config.correction, config.correction_level, *bounds)
            if trained
            else 0.0
            for t, trained in enumerate(one.mask)
        ]
        assert gradient[0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


@settings(deadline=None)
@given(st.floats(-4, 4), st.floats(-4, 4))
def test_k3_is_a_distance(new: float, ref: float) -> None:
    """Law 3."""
    logprobs = torch.tensor([[new]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=None,
        sampler_logprobs=None,
        ref_logprobs=one * ref,
        entropies=None,
        loss_mask=torch.ones(1, 1, dtype=torch.bool),
        policy_mask=None,
        advantages=torch.zeros(1, dtype=torch.float64),
        sequence_ids=torch.zeros(1, 1, dtype=torch.long),
        loss_weights=torch.ones(1, dtype=torch.float64),
    )
    loss, _ = policy_loss(inputs, LossConfig(beta=1.0))
    loss.backward()
    assert loss.item() >= -1e-15
    assert logprobs.grad is not None
    gradient = logprobs.grad.item()
    assert gradient == pytest.approx(1 - math.exp(ref - new), rel=1e-9, abs=1e-12)
    assert (gradient == 0) == (new == ref) or abs(new - ref) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_untrained_positions_may_hold_anything(loss: str) -> None:
    sequences = make_sequences(1)
    inputs, _ = make_inputs(
        sequences, weights_of(sequences, "token"), list(range(len(sequences))), "packed"
    )
    config = config_of(options_for(loss, "all", "token"))
    inputs = with_policy_mask(inputs, oracle.entropy_bar(sequences, config.top_entropy_frac))
    plain, expected_stats = policy_loss(inputs, config)
    plain.backward()
    assert inputs.logprobs.grad is not None
    expected = inputs.logprobs.grad.clone()
    inputs.logprobs.grad = None
    with torch.no_grad():
        for name, value in (
            ("logprobs", math.inf),
            ("old_logprobs", math.nan),
            ("sampler_logprobs", -math.inf),
            ("ref_logprobs", math.nan),
            ("entropies", math.inf),
        ):
            getattr(inputs, name)[~inputs.loss_mask] = value
    value, stats = policy_loss(inputs, config)
    value.backward()
    assert value.item() == plain.item()
    assert torch.equal(inputs.logprobs.grad, expected)
    assert stats == expected_stats
    assert stats["ratio"].count == inputs.loss_mask.sum()


def two_tokens(advantage: float, log_ratio: tuple[float, float], **options: Any) -> Tensor:
    """The loss of one sequence of two tokens with probabilities 0.5 and 0.2 before, weight 1."""
    old = torch.log(torch.tensor([[0.5, 0.2]], dtype=torch.float64))
    return policy_loss(
        LossInputs(
            logprobs=old + torch.tensor([log_ratio], dtype=torch.float64),
            old_logprobs=old,
            sampler_logprobs=old,
            ref_logprobs=None,
            entropies=torch.tensor([[0.3, 1.7]], dtype=torch.float64),
            loss_mask=torch.ones(1, 2, dtype=torch.bool),
            policy_mask=torch.tensor([[False, True]]),
            advantages=torch.tensor([advantage], dtype=torch.float64),
            sequence_ids=torch.zeros(1, 2, dtype=torch.long),
            loss_weights=torch.ones(1, dtype=torch.float64),
        ),
        LossConfig(**options),
    )[0]


UP, DOWN = math.log(1.5), math.log(0.5)  # probabilities 0.75 and 0.1


@pytest.mark.parametrize(
    ("advantage", "options", "expected"),
    [
        (2.0, {"clip_low": 0.2, "clip_high": 0.28}, -2 * (1.28 + 0.5)),
        (-2.0, {"clip_low": 0.2, "clip_high": 0.28}, 2 * (1.5 + 0.8)),
        (-2.0, {"delta": 1.4}, 2 * (1.4 + 0.8)),
        (-2.0, {"delta": 1.2, "clip_high": 0.6}, 2 * (1.5 + 0.8)),
        (-2.0, {"dual_clip": 1.1}, 2 * (1.1 + 0.8)),
        # One ratio for both tokens: sqrt(1.5 * 0.5).
        (2.0, {"loss": "gspo", "clip_low": 0.2}, -4 * math.sqrt(0.75)),
        (-2.0, {"loss": "gspo", "clip_low": 0.1}, 4 * 0.9),
        (
            2.0,
            {"loss": "cispo", "cispo_cap": 1.2},
            -2 * (1.2 * math.log(0.75) - 0.5 * math.log(10)),
        ),
        (-2.0, {"loss": "cispo"}, 2 * (1.5 * math.log(0.75) - 0.5 * math.log(10))),
        (
            2.0,
            {"loss": "sapo"},
            -8 * (1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(0.5))),
        ),
        (
            -2.0,
            {"loss": "sapo"},
            8 / 1.05 * (1 / (1 + math.exp(-0.525)) + 1 / (1 + math.exp(0.525))),
        ),
        # The first token rose by 0.25 > 0.2, the second fell by 0.1.
        (2.0, {"loss": "dppo_tv"}, -2 * 0.5 + 1e-3 * (UP**2 + DOWN**2)),
        (-2.0, {"loss": "dppo_tv"}, 2 * (1.5 + 0.5) + 1e-3 * (UP**2 + DOWN**2)),
        (-2.0, {"loss": "dppo_tv", "dppo_tv": 0.05}, 2 * 1.5 + 1e-3 * (UP**2 + DOWN**2)),
        (0.0, {"loss": "dppo_tv", "dppo_tv": 0.05}, 1e-3 * (UP**2 + DOWN**2)),
        (2.0, {"loss": "reinforce"}, -2 * (math.log(0.75) - math.log(10))),
        (2.0, {"loss": "reinforce", "top_entropy_frac": 0.5}, 2 * math.log(10)),
        (0.0, {"entropy_coef": 0.5}, -0.5 * 2.0),
    ],
    ids=str,
)
def test_losses_by_hand(advantage: float, options: dict[str, Any], expected: float) -> None:
    assert two_tokens(advantage, (UP, DOWN), **options).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("advantage", "dropped"), [(-2.0, True), (2.0, False)])
def test_the_off_policy_mask_drops_whole_sequences(advantage: float, dropped: bool) -> None:
    """The sampler found the tokens likelier by (-UP - DOWN) / 2 = 0.144 nats on average."""
    kept = two_tokens(advantage, (UP, DOWN), off_policy_threshold=0.15)
    assert kept.item() == two_tokens(advantage, (UP, DOWN)).item() != 0
    lost = two_tokens(advantage, (UP, DOWN), off_policy_threshold=0.14)
    assert (lost.item() == 0) is dropped


def test_weights_by_hand() -> None:
    lengths, groups = [4, 0, 6, 10], [5, 5, 9, 9]
    assert loss_weights_for("token", lengths).dtype == torch.float32
    assert loss_weights_for("token", lengths).tolist() == pytest.approx([1 / 20] * 4)
    assert loss_weights_for("sequence", lengths).tolist() == pytest.approx(
        [1 / 16, 0, 1 / 24, 1 / 40]
    )
    assert loss_weights_for("constant", lengths, None, 16).tolist() == pytest.approx([1 / 64] * 4)
    assert loss_weights_for("prompt", lengths, groups).tolist() == pytest.approx(
        [1 / 8, 1 / 8, 1 / 32, 1 / 32]
    )
    with pytest.raises(ValueError, match="max_completion_length"):
        loss_weights_for("constant", lengths)
    with pytest.raises(ValueError, match="group"):
        loss_weights_for("prompt", lengths)
    with pytest.raises(ValueError, match="unknown aggregation"):
        loss_weights_for("mean", lengths)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("missing", "options"),
    [
        ("ref_logprobs", {"beta": 0.1}),
        ("sampler_logprobs", {"ratio_anchor": "sampler"}),
        ("sampler_logprobs", {"loss": "dppo_tv"}),
        ("sampler_logprobs", {"correction": "tis"}),
        ("sampler_logprobs", {"off_policy_threshold": 0.1}),
        ("entropies", {"entropy_coef": 0.1}),
        ("policy_mask", {"top_entropy_frac": 0.5}),
    ],
    ids=str,
)
def test_what_a_loss_needs_is_named(missing: str, options: dict[str, Any]) -> None:
    sequences = make_sequences(4)
    inputs, _ = make_inputs(sequences, weights_of(sequences, "token"), [0, 1])
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        policy_loss(replace(inputs, **{missing: None}), LossConfig(**options))


def by_hand(inputs: LossInputs) -> tuple[list[Tensor], Tensor, Tensor]:
    """Each sequence's mask, the ratio to the old policy, and old's gap to the sampler."""
    assert inputs.old_logprobs is not None and inputs.sampler_logprobs is not None
    masks = [
        inputs.loss_mask & (inputs.sequence_ids == number)
        for number in range(len(inputs.advantages))
    ]
    ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp()
    return masks, ratio, inputs.old_logprobs - inputs.sampler_logprobs


@pytest.mark.parametrize("correction", ["none", "tis", "icepop"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_statistics_by_sequence_and_after_the_correction(correction: Any, level: Any) -> None:
    """clip_ratio/low_min and high_max are over sequences' shares; the sampler's ratio as used."""
    sequences = make_sequences(7)
    inputs, _ = make_inputs(
        sequences, weights_of(sequences, "token"), list(range(len(sequences))), "packed"
    )
    config = LossConfig(
        clip_low=0.05,
        clip_high=0.05,
        correction=correction,
        correction_level=level,
        correction_min=0.8,
        correction_max=1.1,
    )
    masks, ratio, gap = by_hand(inputs)
    low, high, ratios = [], [], []
    for mine, advantage in zip(masks, inputs.advantages.tolist(), strict=True):
        if not mine.any():  # a sequence without trained tokens is in no statistic
            continue
        low.append(float(((ratio[mine] < 0.95) & (advantage < 0)).double().mean()))
        high.append(float(((ratio[mine] > 1.05) & (advantage > 0)).double().mean()))
        ratios += (
            [gap[mine].mean().exp().item()] if level == "sequence" else gap[mine].exp().tolist()
        )
    if correction == "tis":
        ratios = [min(value, 1.1) for value in ratios]
    if correction == "icepop":
        ratios = [value if 0.8 <= value <= 1.1 else 0.0 for value in ratios]
    _, stats = policy_loss(inputs, config)
    assert max(low) > 0
    assert max(high) > 0
    assert stats["clip_ratio/low_min"].min == pytest.approx(min(low))
    assert stats["clip_ratio/high_max"].max == pytest.approx(max(high))
    reported = stats["sampling/importance_sampling_ratio"]
    assert reported.count == len(ratios)
    assert reported.mean == pytest.approx(sum(ratios) / len(ratios))
    assert (reported.min, reported.max) == pytest.approx((min(ratios), max(ratios)))


@pytest.mark.parametrize("anchor", ["old", "sampler"])
def test_the_gap_to_the_sampler_is_measured_before_any_correction(anchor: Any) -> None:
    sequences = make_sequences(8)
    inputs, _ = make_inputs(sequences, weights_of(sequences, "token"), list(range(6)), "shared")
    _, _, gap = by_hand(inputs)
    gap = gap[inputs.loss_mask]
    correction: Any = "tis" if anchor == "old" else "none"
    config = LossConfig(correction=correction, correction_max=0.5, ratio_anchor=anchor)
    _, stats = policy_loss(inputs, config)
    absolute = stats["sampling/sampling_logp_difference"]
    assert absolute.mean == pytest.approx(gap.abs().mean().item())
    assert absolute.max == pytest.approx(gap.abs().max().item())
    weights = gap.exp()
    metrics = stat_metrics(stats)
    expected = (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item()
    assert metrics["ess"] == pytest.approx(expected)
    assert metrics["sampling/logprob_gap_mean"] == pytest.approx(gap.abs().mean().item())
    assert metrics["sampling/logprob_gap_max"] == pytest.approx(gap.abs().max().item())
    assert metrics["sampling/kl/mean"] == pytest.approx((weights - 1 - gap).mean().item())
    assert "kl" not in metrics, "that name is for the reference"


def test_shares_of_the_other_losses() -> None:
    sequences = make_sequences(2)
    inputs, _ = make_inputs(sequences, weights_of(sequences, "token"), list(range(6)), "packed")
    masks, ratio, _ = by_hand(inputs)
    # Sequences without trained tokens are in no share.
    advantages = [a for a, m in zip(inputs.advantages.tolist(), masks, strict=True) if m.any()]
    masks = [mine for mine in masks if mine.any()]
    assert len(masks) < len(sequences)
    stats = {
        loss: policy_loss(inputs, config_of(options_for(loss, "alone", "token")))[1]
        for loss in ("gspo", "cispo", "dppo_tv")
    }
    # gspo clips sequences: each counts once.
    means = [ratio[mine].log().mean().exp().item() for mine in masks]
    low = [float(m < 0.95 and a < 0) for m, a in zip(means, advantages, strict=True)]
    high = [float(m > 1.08 and a > 0) for m, a in zip(means, advantages, strict=True)]
    assert stats["gspo"]["clip_ratio/low_mean"].sum == sum(low)
    assert stats["gspo"]["clip_ratio/high_mean"].sum == sum(high)
    assert sum(low) + sum(high) > 0
    assert stats["gspo"]["clip_ratio/region_mean"].count == len(masks)
    positive = [a > 0 for a in advantages]
    capped = sum(int((ratio[m] > 1.2).sum()) for m, p in zip(masks, positive, strict=True) if p)
    assert stats["cispo"]["cispo_clip_ratio"].sum == capped > 0
    assert inputs.sampler_logprobs is not None
    moved = inputs.logprobs.detach().exp() - inputs.sampler_logprobs.exp()
    rose = sum(int((moved[m] > 0.05).sum()) for m, p in zip(masks, positive, strict=True) if p)
    fell = sum(int((moved[m] < -0.05).sum()) for m, p in zip(masks, positive, strict=True) if not p)
    assert stats["dppo_tv"]["clip_ratio/high_mean"].sum == rose > 0
    assert stats["dppo_tv"]["clip_ratio/low_mean"].sum == fell > 0
    threshold = BESIDE["off-policy mask"]["off_policy_threshold"]
    config = config_of(options_for("clip", "off-policy mask", "token"))
    left = -(inputs.logprobs.detach() - inputs.sampler_logprobs)
    dropped = sum(
        float(left[mine].mean() > threshold)
        for mine, p in zip(masks, positive, strict=True)
        if not p
    )
    reported = policy_loss(inputs, config)[1]["off_policy_frac"]
    assert (reported.sum, reported.count) == (dropped, len(masks))
    assert dropped > 0
