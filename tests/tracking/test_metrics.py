"""Metrics by their definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.tracking.files import MetricsFile, read_metrics
from raygrpo.tracking.metrics import StepFacts, reward_metrics, stat_metrics, step_metrics
from raygrpo.types import GroupSummary, Score, Stat
from tests.builders import score, summary


def facts(finished: list[GroupSummary], trained: list[GroupSummary], **keys: Any) -> StepFacts:
    defaults: dict[str, Any] = {
        "step": 3, "stats": {}, "epoch": 0.5, "num_tokens": 100, "step_s": 2.0, "update_s": 0.5,
        "num_teaching": 0,
    }  # fmt: skip
    return StepFacts(finished=finished, trained=trained, **{**defaults, **keys})


def test_rewards_are_trls_over_all_finished_groups() -> None:
    mixed, alike, other = [1.0, 0.0, 0.0, 1.0], [1.0] * 4, [0.0, 0.0, 0.0, 2.0]
    groups = [summary(i, rewards) for i, rewards in enumerate((mixed, alike, other))]
    metrics = step_metrics(facts(groups, [groups[0], groups[2]], num_teaching=2))
    everything = np.array([mixed, alike, other])
    assert metrics["reward"] == pytest.approx(everything.mean())
    assert metrics["reward_std"] == pytest.approx(everything.std(ddof=1))
    assert metrics["group_reward_std"] == pytest.approx(everything.std(axis=1, ddof=1).mean())
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["frac_no_signal"] == pytest.approx(1 / 3)
    assert metrics["rewards/r/mean"] == pytest.approx(everything.mean())
    assert metrics["rewards/r/std"] == pytest.approx(everything.std(ddof=1))
    trained = everything[[0, 2]]
    assert metrics["trained/reward"] == pytest.approx(trained.mean())
    assert metrics["trained/reward_std"] == pytest.approx(trained.std(ddof=1))
    deviations = trained.std(axis=1, ddof=1)
    assert metrics["trained/group_reward_std"] == pytest.approx(deviations.mean())
    assert metrics["trained/frac_reward_zero_std"] == 0.0
    assert (metrics["num_groups"], metrics["trained/num_groups"]) == (3, 2)
    assert (metrics["epoch"], metrics["num_tokens"], metrics["step_time"]) == (0.5, 100, 2.0)
    assert metrics["timing/tokens_per_s"] == 3 * 4 * 4 / 2.0


def test_none_and_errored_scores_are_in_no_mean() -> None:
    scored, lonely = summary(0, [1.0, "boom", 0.0, None]), summary(1, [1.0, None])
    metrics = reward_metrics([scored, lonely])
    assert metrics["reward"] == pytest.approx(2 / 3)
    assert metrics["reward/error_frac"] == pytest.approx(1 / 6)
    assert metrics["reward_std"] == pytest.approx(np.std([1.0, 0.0, 1.0], ddof=1))
    assert metrics["group_reward_std"] == pytest.approx(math.sqrt(0.5))  # the lonely one has none
    assert metrics["frac_reward_zero_std"] == 0.0
    alike = summary(2, [2.0, 2.0, None, None])
    assert reward_metrics([scored, lonely, alike])["frac_reward_zero_std"] == pytest.approx(1 / 3)
    # A part that was computed before another reward failed still belongs to an errored score.
    half = Score(value=None, parts={"r": 9.0}, error="boom")
    mixed = replace(summary(3, [1.0, 1.0]), scores=(half, score(1.0)))
    assert reward_metrics([mixed])["rewards/r/mean"] == 1.0


def test_a_rewards_metric_replaces_none_of_ours(tmp_path: Path) -> None:
    group = replace(summary(0, [1.0, 0.0]), metrics={"reward": (9.0,), "step": (7.0,), "x": (2.0,)})
    metrics = reward_metrics([group])
    assert (metrics["reward"], metrics["x"]) == (0.5, 2.0)
    with MetricsFile(tmp_path / "m.jsonl", resume_step=None) as file:
        file.log(3, metrics)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [3]


def test_no_metric_stands_for_nothing() -> None:
    metrics = step_metrics(facts([summary(0, [None, None])], []))
    assert "reward" not in metrics
    assert "reward_std" not in metrics
    assert not any(name.startswith("trained/reward") for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(math.isfinite(v) for v in step_metrics(facts([], [])).values())


def test_lengths_tell_terminated_from_clipped() -> None:
    one = summary(0, [0.0] * 4, lengths=[2, 4, 6, 8], finishes=["stop", "length"] * 2)
    metrics = step_metrics(facts([one], [one]))
    expected = {"mean_length": 5, "min_length": 2, "max_length": 8, "clipped_ratio": 0.5}
    expected |= {f"{of}_terminated_length": x for of, x in (("mean", 4), ("min", 2), ("max", 6))}
    assert {name: metrics[f"completions/{name}"] for name in expected} == expected
    endless = summary(0, [0.0] * 2, finishes=["length", "length"])
    metrics = step_metrics(facts([endless], []))
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_terminated_length"] == 0


def test_staleness_counts_versions_behind_the_step() -> None:
    fresh, stale = summary(0, [0.0, 1.0], step=3), summary(1, [0.0, 1.0], step=1)
    metrics = step_metrics(facts([fresh, stale], [fresh, stale], step=3))
    assert metrics["staleness/mean"] == 1.0
    assert metrics["staleness/max"] == 2.0


@given(st.lists(st.floats(0.05, 20.0), min_size=1, max_size=30))
def test_learner_statistics_and_effective_sample_size(weights: list[float]) -> None:
    w = np.array(weights)

    def stat(values: Any) -> Stat:
        return Stat(sum=values.sum(), count=len(values), min=values.min(), max=values.max())

    metrics = stat_metrics(
        {
            "entropy": stat(w),
            "kl": Stat(sum=0.0, count=0.0, min=math.inf, max=-math.inf),
            "clip_ratio/low_min": stat(w),
            "clip_ratio/high_max": stat(w),
            "sampling/importance_sampling_ratio": stat(w.clip(max=2.0)),
            "sampling/token_ratio": stat(w),
            "sampling/token_ratio_squared": stat(w**2),
        }
    )
    assert metrics["entropy"] == pytest.approx(w.mean())
    assert "kl" not in metrics
    capped = w.clip(max=2.0)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(capped.mean())
    assert metrics["sampling/importance_sampling_ratio/min"] == capped.min()
    assert metrics["sampling/importance_sampling_ratio/max"] == capped.max()
    assert (metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"]) == (w.min(), w.max())
    assert not any("token_ratio" in name for name in metrics)
    assert metrics["ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()))
    assert metrics["ess"] <= 1 + 1e-12


def test_values_that_rewards_report_are_averaged() -> None:
    depths = [(1.0, 2.0), (6.0, math.nan)]
    groups = [replace(summary(i, [0.0, 1.0]), metrics={"depth": d}) for i, d in enumerate(depths)]
    assert reward_metrics(groups)["depth"] == 3.0
