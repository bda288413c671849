"""A smoke run is a run: ranks, scorers, rewards and ZeRO as configured, on a tiny twin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import runs
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("shared_ray")


def test_smoke_trains_two_steps_and_leaves_nothing(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "gemma", "gemma3", seed=1)
    config = runs.write_run(
        tmp_path,
        "run",
        deterministic=False,
        model={"path": str(tmp_path / "gemma")},
        train={"steps": 50, "groups_per_step": 8},
        eval={"eval_steps": 10, "num_prompts": 20},
        learner={"num_ranks": 2, "zero_stage": 2},
        scorers={"count": 2},
    )
    output = runs.run(config, "--smoke")
    assert "train.steps: 2" in output
    assert "gemma3_text with 2 layers" in output
    assert "step 2/2" in output
    assert "smoke run passed" in output
    assert not runs.run_dir(config).exists()
    assert not place(output).exists()


@pytest.mark.slow
def test_smoke_fails_as_the_run_would(tmp_path: Path) -> None:
    source = "def fails(completions, **_):\n    raise RuntimeError('the judge is out to lunch')\n"
    rewards = [runs.reward(tmp_path, "fails", source)]
    config = runs.write_run(tmp_path, "fails", rewards=rewards)
    output = runs.run(config, "--smoke", expected=4)
    assert "the judge is out to lunch" in output
    assert "smoke run passed" not in output
    assert not place(output).exists()


def place(output: str) -> Path:
    found = re.search(r"smoke run in (\S+);", output)
    assert found is not None
    return Path(found[1])
