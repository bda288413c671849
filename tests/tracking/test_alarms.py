"""Alarms begin once, at the step that passes the limit, and again only after they have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raygrpo.tracking.alarms import WINDOW, Alarms
from tests import builders
from tests.tracking.tracking_cases import events_of, tracked


def ring(metric: str, values: list[float], **sections: Any) -> list[tuple[int, str]]:
    alarms = Alarms(builders.config(**sections))
    return [
        (step, alarm.name)
        for step, value in enumerate(values)
        for alarm in alarms.check({metric: value})
    ]


@pytest.mark.parametrize(
    ("metric", "calm", "bad", "name"),
    [
        ("frac_no_signal", 0.5, 1.0, "no_signal"),
        ("completions/clipped_ratio", 0.2, 0.9, "truncation"),
    ],
)
def test_a_share_rings_once_its_mean_passes(
    metric: str, calm: float, bad: float, name: str
) -> None:
    values = [calm] * WINDOW + [bad] * (2 * WINDOW) + [calm] * WINDOW + [bad] * WINDOW
    rung = ring(metric, values)
    assert [found for _, found in rung] == [name, name]
    first = rung[0][0]
    assert WINDOW < first < 2 * WINDOW  # before a whole window is bad, after the first bad step
    assert ring(metric, [calm] * 30) == []
    # A run that starts badly is told so after a window, not at once.
    assert ring(metric, [bad] * WINDOW) == [(WINDOW - 1, name)]


def test_entropy_is_compared_with_the_runs_first_steps() -> None:
    assert ring("entropy", [0.1] * 30) == []  # low from the start is the model's nature
    rung = ring("entropy", [2.0] * WINDOW + [1.0] * WINDOW + [0.1] * WINDOW)
    assert [name for _, name in rung] == ["entropy_collapse"]


def test_a_spike_is_against_the_median_before_it() -> None:
    assert ring("grad_norm", [1.0] * WINDOW + [9.0, 1.0, 11.0, 1.0, 11.0]) == [
        (WINDOW + 2, "gradient_spike"),
        (WINDOW + 4, "gradient_spike"),
    ]
    assert ring("grad_norm", [0.0] * 10 + [1.0]) == []  # nothing was learned before: no scale
    assert ring("grad_norm", [1.0, 50.0]) == []


def test_a_skipped_update_rings_at_once() -> None:
    name = "skipped_updates"
    assert ring("skipped_updates_frac", [0, 0, 0.5, 1, 0, 0.25]) == [(2, name), (5, name)]


def test_a_step_without_the_metric_changes_nothing() -> None:
    alarms = Alarms(builders.config())
    for _ in range(WINDOW):
        alarms.check({"grad_norm": 1.0})
        assert alarms.check({"loss": 1e9}) == []
    assert [a.name for a in alarms.check({"grad_norm": 20.0})] == ["gradient_spike"]


def test_the_tracker_records_alarms(tmp_path: Path) -> None:
    with tracked(tmp_path) as tracker:
        for step in range(1, WINDOW + 1):
            tracker.log_step(step, {"completions/clipped_ratio": 1.0})
    (alarm,) = events_of(tmp_path / "run")
    assert (alarm["name"], alarm["value"], alarm["limit"]) == ("truncation", 1.0, 0.5)
    assert alarm["step"] == WINDOW


def test_an_unlike_sampler_rings_at_once_and_once() -> None:
    assert ring("ess", [1.0, 0.81, 0.79, 0.5, 0.9, 0.3]) == [(2, "low_ess"), (5, "low_ess")]
    assert ring("sampling/logprob_gap_mean", [0.02, 0.09, 0.2, 0.3]) == [(2, "logprob_gap")]


@pytest.mark.parametrize("filters", [{"top_p": 0.8}, {"min_p": 0.1}])
def test_ratios_to_a_renormalised_sampler_ring_nothing(filters: dict[str, float]) -> None:
    """They hold the mass that the filter cut off, however alike the two policies are."""
    sampling = {"filters": filters}
    assert ring("ess", [0.3], sampling=sampling) == []
    assert ring("sampling/logprob_gap_mean", [0.2], sampling=sampling) == []
    assert ring("skipped_updates_frac", [1.0], sampling=sampling) == [(0, "skipped_updates")]
