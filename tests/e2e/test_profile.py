"""``train --profile-step``: traces of the learner and of a generator, and no other result."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A deterministic run whose second step of three is traced, and its output."""
    config = runs.write_run(tmp_path_factory.mktemp("profile"), "run", train={"steps": 3})
    return config, runs.run(config, "--profile-step", "2")


def operators(path: Path) -> Counter[str]:
    """How often each operator, and each named part, is in a trace."""
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return Counter(e["name"] for e in events if e.get("cat") in ("cpu_op", "user_annotation"))


def test_both_traces_hold_the_work_of_their_step(profiled: tuple[Path, str]) -> None:
    config, output = profiled
    directory = runs.run_dir(config) / "profile"
    assert [path.name for path in directory.iterdir()] == ["step-2"]
    names = sorted(path.name for path in (directory / "step-2").iterdir())
    assert names == ["generator-0.json.gz", "generator-0.txt", "learner-0.json.gz", "learner-0.txt"]
    learner = operators(directory / "step-2" / "learner-0.json.gz")
    backward = "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"
    assert learner[backward] > 0, "the learner goes backward"
    assert learner["Optimizer.step#AdamW.step"] == 1, "one update of one step"
    generator = operators(directory / "step-2" / "generator-0.json.gz")
    assert not any("Backward" in name or "autograd" in name for name in generator)
    # Six tokens of a group at least, each through two layers.
    assert generator["aten::scaled_dot_product_attention"] >= 12
    for name in ("learner-0", "generator-0"):
        assert "Self CPU" in (directory / "step-2" / f"{name}.txt").read_text()
    (event,) = runs.events(config, "profile")
    assert event["learner"] == str(directory / "step-2" / "learner-0.json.gz")
    assert event["generator"] == str(directory / "step-2" / "generator-0.json.gz")
    assert event["learner"] in output


def test_a_profile_changes_no_result(profiled: tuple[Path, str]) -> None:
    """The weights are those of the serial example, which nothing profiles, bit for bit."""
    config, _ = profiled
    weights, _ = runs.serial(config)
    runs.assert_same_weights(runs.weights(config), weights)


def test_a_step_that_is_not_left_is_bad_input(profiled: tuple[Path, str]) -> None:
    config, _ = profiled
    output = runs.run(config, "--profile-step", "3", "--train.steps=3", expected=2)
    assert "no step 3 to profile: this run has 3 steps, 3 of them trained" in output
