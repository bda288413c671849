"""Asynchronous training: weights land in the middle of completions, and the bound holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import runs

pytestmark = pytest.mark.usefixtures("shared_ray")
STALENESS, STEPS = 2, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = runs.write_run(
        tmp_path_factory.mktemp("asynchronous"),
        "run",
        deterministic=False,
        # A completion takes some hundred decode steps, an update of this model less time.
        sampling={"num_completions": 4, "max_tokens": 300, "filters": {"min_tokens": 200}},
        train={"steps": STEPS, "groups_per_step": 2, "max_staleness": STALENESS,
               "dynamic_sampling": False, "tokens_per_microbatch": 2048},
        # One group more than a step's decodes at once: each step finds one in its middle.
        generators={"max_rows": 12},
        optimizer={"lr": 1e-3, "schedule": "constant"},
    )  # fmt: skip
    runs.run(config)
    return config


def trained(config: Path) -> list[tuple[int, dict[str, Any]]]:
    """(Version that the step trained, completion) of every completion that a step took."""
    paths = sorted((runs.run_dir(config) / "completions").glob("step-*.parquet"))
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return [(row["step"], row) for row in rows if row["fate"] == "trained"]


def test_weights_land_in_the_middle_of_completions(config: Path) -> None:
    rows = trained(config)
    assert len(rows) == STEPS * 2 * 4
    mixed = [row for _, row in rows if len(row["version_steps"]) > 1]
    assert mixed, "no completion saw an update"
    for _, row in rows:
        assert sum(row["version_counts"]) == len(row["token_ids"])
        assert 200 <= len(row["token_ids"]) <= 300, (
            "as sampling.filters.min_tokens and max_tokens say"
        )
        assert row["version_steps"] == sorted(set(row["version_steps"])), "versions go forward"


def test_the_bound_counts_the_oldest_token(config: Path) -> None:
    steps = {row["step"]: row for row in runs.metrics(config)}
    lags: dict[int, list[int]] = {}
    newest: list[int] = []
    for step, row in trained(config):
        base = step - 1
        lags.setdefault(step, []).append(base - min(row["version_steps"]))
        newest.append(base - max(row["version_steps"]))
    for step, found in lags.items():
        assert max(found) <= STALENESS
        assert steps[step]["staleness/max"] == max(found)
        assert steps[step]["staleness/mean"] == pytest.approx(sum(found) / len(found))
    assert sum(newest) < sum(sum(found) for found in lags.values()), "oldest and newest differ"
    assert max(max(found) for found in lags.values()) == STALENESS, "generation ran ahead"


def test_both_sides_say_how_long_they_waited(config: Path) -> None:
    rows = runs.metrics(config)
    for name in ("timing/generator_idle_frac", "timing/learner_wait_frac"):
        values = [row[name] for row in rows if name in row]
        assert len(values) >= STEPS - 1
        assert all(0 <= value <= 1 for value in values)
    assert all(row["ledger/unexplained"] == 0 for row in rows)
    # Here generation takes longer than training, so one side works on and the other waits; in the
    # last steps nothing is left to generate.
    middle = rows[2 : STEPS - STALENESS]
    assert max(row["timing/generator_idle_frac"] for row in middle) < 0.5
