"""Runs beside the default one: asynchronous, sharded, several updates, bf16, with a reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs

pytestmark = pytest.mark.usefixtures("shared_ray")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modes")


@pytest.mark.slow
def test_a_resumed_asynchronous_run_keeps_its_bound(directory: Path) -> None:
    config = runs.write_run(
        directory,
        "asynchronous",
        deterministic=False,
        train={"steps": 6, "max_staleness": 2},
        generators={"count": 2},
        loss={"correction": "tis"},
        checkpoint={"save_steps": 1, "keep": 0},
    )
    process = runs.start(config)
    checkpoints = runs.run_dir(config) / "checkpoints"
    runs.wait_for(process, lambda: (checkpoints / "step-00000003").is_dir(), "checkpoint 3")
    process.kill()
    process.wait(timeout=60)
    runs.run(config)
    steps = runs.metrics(config)
    assert runs.steps(config) == list(range(1, 7))
    assert 1 <= max(row["staleness/max"] for row in steps) <= 2, "generation ran ahead of training"
    assert all(row["ledger/unexplained"] == 0 for row in steps)


@pytest.mark.slow
def test_zero_3_with_all_that_a_step_can_do(directory: Path) -> None:
    """Two ranks under ZeRO-3, two minibatches twice over, a KL to the reference, checkpointing."""
    config = runs.write_run(
        directory,
        "zero3",
        train={"steps": 3, "num_minibatches": 2, "num_iterations": 2},
        learner={"num_ranks": 2, "zero_stage": 3, "gradient_checkpointing": True},
        loss={"beta": 0.02, "aggregation": "sequence"},
        advantage={"scale": "group"},
        optimizer={"lr": 1e-3, "warmup_updates": 2, "schedule": "cosine"},
        checkpoint={"save_steps": 1},
    )
    runs.run(config)
    steps = runs.metrics(config)
    assert len(steps) == 3
    assert steps[0]["kl"] >= 0
    assert steps[-1]["kl"] > 0, "the policy has left its reference"
    # fp32: what was gathered from the shards and published is what the ranks compute with.
    assert max(row["sampling/sampling_logp_difference/max"] for row in steps) < 1e-4
    # The first pass over a step has ratio 1; the second has not.
    assert steps[0]["ratio"] != 1.0


@pytest.mark.slow
def test_bfloat16_runs(directory: Path) -> None:
    config = runs.write_run(
        directory,
        "bf16",
        deterministic=False,
        model={"dtype": "bfloat16"},
        train={"steps": 3},
        optimizer={"lr": 1e-5, "schedule": "constant"},
        learner={"num_ranks": 2, "zero_stage": 2},
    )
    runs.run(config)
    assert all(str(t.dtype) == "torch.bfloat16" for t in runs.weights(config).values())
    first, *others = runs.metrics(config)
    assert first["sync/bytes"] == first["sync/full_bytes"]
    # At a small learning rate few of the rounded weights move, so that deltas travel.
    for row in others:
        assert row["loss"] == row["loss"]
        assert 0 < row["sync/changed_frac"] < 0.03
        assert row["sync/bytes"] < 0.15 * row["sync/full_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_no_evaluation_is_lost_or_doubled_by_stops(directory: Path, again: bool) -> None:
    """Stopped right after the start, then wherever step 2's evaluation is: all are there, once."""
    config = runs.write_run(
        directory,
        f"evaluated-{again}",
        train={"steps": 4},
        eval={
            "eval_steps": 2,
            "data": {"source": str(directory / "rows.jsonl")},
            "num_prompts": 25,
            "num_completions": 4,
        },
    )
    process = runs.start(config)
    runs.wait_for_event(process, config, "started")
    process.terminate()
    runs.finish(process, config, expected=3)
    process = runs.start(config)
    if again:
        runs.wait_for_step(process, config, 1)
        process.terminate()
    if process.wait(timeout=runs.DEADLINE_S) == 3:
        process = runs.start(config)
    runs.finish(process, config)
    rows = runs.metrics(config)
    assert runs.steps(config) == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 2, 4]
    assert all(row["eval/num_completions"] == 100 for row in rows if "eval/reward" in row)
