"""A run whose reward is a model in an actor of its own, killed while the run goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import runs
from tests.tiny_reward import save_tiny_reward_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reward-model")
    save_tiny_reward_model(directory / "judge")
    rewards = [
        {
            "func": "reward_model",
            "params": {"path": str(directory / "judge"), "batch_size": 3},
            "timeout_s": 60.0,
        },
        {"func": f"{directory / 'reward.py'}:digits", "weight": 0.5, "cache": True},
    ]
    config = runs.write_run(
        directory,
        "run",
        rewards=rewards,
        train={"steps": 6, "max_staleness": 2},
        deterministic=False,
        advantage={"rewards": "normalise_then_sum"},
        optimizer={"lr": 1e-3},
    )
    process = runs.start(config)
    runs.wait_for(process, lambda: len(runs.metrics(config)) >= 2, "the second step")
    (started,) = runs.events(config, "started")
    os.kill(started["pids"]["reward-model-0"], signal.SIGKILL)
    runs.finish(process, config)
    return config


def test_the_model_is_replaced_and_no_score_is_lost(finished: Path) -> None:
    (replaced,) = runs.events(finished, "worker_replaced")
    assert replaced["worker"] == "reward-model-0"
    assert not runs.events(finished, "group_lost") and not runs.events(finished, "group_dropped")
    steps = runs.metrics(finished)
    assert [row["step"] for row in steps if "reward" in row] == list(range(7))[-6:]
    for row in steps:
        if "reward" in row:
            assert row["reward/error_frac"] == row["rewards/reward_model/error_frac"] == 0
            assert row["timing/rewards/reward_model_s"] > 0
            assert row["rewards/reward_model/std"] > 0
