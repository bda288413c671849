"""Deterministic runs equal examples/serial.py, a run with killed workers, and a resumed run.

Each run is a process with a Ray of its own, as a user starts it; most of them are killed.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raygrpo.training.state import load_state
from tests import runs

# Refill is off in the runs that are killed: their groups' ids then do not depend on rewards, which
# makes a doubled or skipped prompt visible at once.
SAVES = {"checkpoint": {"save_steps": 1, "keep": 0}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def undisturbed(directory: Path) -> Path:
    """A run from start to end, with a checkpoint after every step."""
    config = runs.write_run(directory, "undisturbed", **SAVES)
    runs.run(config)
    return config


def test_equals_the_serial_example_bit_for_bit(directory: Path, undisturbed: Path) -> None:
    weights, output = runs.serial(undisturbed)
    runs.assert_same_weights(runs.weights(undisturbed), weights)
    start = load_file(directory / "model" / "model.safetensors")
    assert all(not torch.equal(start[name], weights[name]) for name in weights), "all tensors moved"
    rewards = re.findall(r"reward (\S+)", output)
    assert rewards == [f"{row['reward']:.4f}" for row in runs.metrics(undisturbed)]


def test_records_of_a_whole_run(undisturbed: Path) -> None:
    steps = runs.metrics(undisturbed)
    assert runs.steps(undisturbed) == [1, 2, 3, 4, 5]
    for row in steps:
        assert row["ledger/unexplained"] == 0
        assert row["staleness/max"] == 0
        # Sampled in fp32 with the very weights that are trained: the gap is rounding (1e-4 by law,
        # two orders above what a 2-layer model shows).
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["ess"] == pytest.approx(1.0, abs=1e-4)
    rates = [row["learning_rate"] for row in steps]
    assert rates == pytest.approx([1e-2 * (1 - i / 5) for i in range(5)])
    (end,) = runs.events(undisturbed, "run_end")
    assert end["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["generator-0", "scorer-0"])
def test_a_killed_worker_costs_nothing(directory: Path, undisturbed: Path, worker: str) -> None:
    # Colocated too: generators that sleep while the learner trains make the same run.
    colocated = {"generators": {"placement": "colocate"}} if worker == "generator-0" else {}
    config = runs.write_run(directory, f"{worker}-killed", **SAVES, **colocated)
    process = runs.start(config)
    runs.wait_for_step(process, config, 2)
    runs.kill_worker(config, worker)
    runs.finish(process, config)
    runs.assert_same_weights(runs.weights(undisturbed), runs.weights(config))
    (replaced,) = runs.events(config, "worker_replaced")
    assert replaced["worker"] == worker
    assert runs.steps(config) == [1, 2, 3, 4, 5]
    last = runs.metrics(config)[-1]
    assert last["ledger/unexplained"] == 0
    lost = len(replaced["groups"]) if worker == "generator-0" else 0
    assert last["ledger/lost_groups"] == lost, "a scorer's death costs no generation"


@pytest.mark.slow  # test_rollouts.py resumes a killed run and compares its bits too
@pytest.mark.parametrize("times", [1, 2])
def test_killed_and_resumed_is_the_same_run(directory: Path, undisturbed: Path, times: int) -> None:
    """Killed once, it loses its generator before."""
    config = runs.write_run(directory, f"driver_killed_{times}", **SAVES)
    checkpoints = runs.run_dir(config) / "checkpoints"

    def committed(step: int) -> bool:
        return (checkpoints / f"step-{step:08}").is_dir()

    def half_written() -> bool:
        return any(checkpoints.glob(".tmp-step-*/learner/*"))

    points = [
        (lambda: committed(2) and half_written(), "a half-written checkpoint"),
        (lambda: committed(4), "checkpoint 4"),
    ]
    for condition, what in points[:times]:
        process = runs.start(config)
        if times == 1:
            runs.wait_for_step(process, config, 1)
            runs.kill_worker(config, "generator-0")
            runs.wait_for_event(process, config, "worker_replaced")
        runs.wait_for(process, condition, what)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    output = runs.run(config)
    assert "exported model" in output
    runs.assert_same_weights(runs.weights(undisturbed), runs.weights(config))
    assert runs.steps(config) == [1, 2, 3, 4, 5]
    same = ("loss", "grad_norm", "reward", "num_tokens", "learning_rate")
    for row, other in zip(runs.metrics(config), runs.metrics(undisturbed), strict=True):
        assert [row[name] for name in same] == [other[name] for name in same]
    # The generators' proof goes on with the tolerance of the run's first version.
    last = Path("checkpoints", "step-00000005")
    gaps = {load_state(runs.run_dir(c) / last).normal_gap for c in (config, undisturbed)}
    assert len(gaps) == 1
    incarnations = [event["incarnation"] for event in runs.events(config, "resumed")]
    assert incarnations == sorted(set(incarnations)) and len(incarnations) == times


@pytest.mark.slow
def test_stopped_in_order_and_resumed_is_the_same_run(directory: Path, undisturbed: Path) -> None:
    config = runs.write_run(directory, "stopped", checkpoint={"save_steps": 0, "keep": 0})
    process = runs.start(config)
    runs.wait_for_step(process, config, 1)
    process.send_signal(signal.SIGTERM)
    output = runs.finish(process, config, expected=3)
    assert "run the same command to resume" in output
    done = len(runs.metrics(config))
    assert 1 <= done < 5
    assert (runs.run_dir(config) / "checkpoints" / f"step-{done:08}").is_dir()
    runs.run(config)
    runs.assert_same_weights(runs.weights(undisturbed), runs.weights(config))
    assert runs.steps(config) == [1, 2, 3, 4, 5]
