"""Training as a submitted job on a running cluster: logs, exit codes, stop and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests import runs
from tests.e2e.head import Head

STEPS = 200


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A directory to submit, whose paths are relative to itself, and the run's, outside of it."""
    directory = tmp_path_factory.mktemp("job")
    run_dir = tmp_path_factory.mktemp("shared") / "run"
    path = runs.write_run(directory, "config", run_dir=str(run_dir))
    config = yaml.safe_load(path.read_text())
    config["model"]["path"] = "./model"
    config["data"]["source"] = "rows.jsonl"
    config["rewards"][0]["func"] = "reward.py:digits"
    config["train"]["steps"] = STEPS
    path.write_text(yaml.safe_dump(config))
    return directory, path


@pytest.mark.slow
def test_a_bad_configuration_fails_the_job_and_says_why(
    head: Head, project: tuple[Path, Path]
) -> None:
    directory, _ = project
    code, output = head.submit(directory, "--run_dir=grpo_output", id="bad")
    assert code == 1
    assert "run_dir 'grpo_output' is relative: in a submitted job" in output
    assert "exit code 2" in output


def test_a_job_is_stopped_in_order_and_resumed_by_submitting_again(
    head: Head, project: tuple[Path, Path]
) -> None:
    directory, config = project
    code, output = head.submit(directory, id="first", wait=False)
    assert code == 0, output
    runs.wait_for_step(head.process, config, 3)
    code, output = head.job("stop", "first")
    assert code == 0, output
    assert "was stopped" in output

    steps = len(runs.metrics(config))
    (end,) = runs.events(config, "run_end")
    assert 3 <= steps < STEPS
    assert (end["finished"], end["step"]) == (False, steps)
    (saved,) = runs.events(config, "checkpoint")
    assert saved["path"] == f"step-{steps:08}"
    code, logs = head.job("logs", "first")
    assert "stopped, all committed; run the same command to resume" in logs

    code, output = head.submit(directory, f"--train.steps={steps + 2}", id="second")
    assert code == 0, output
    assert f"step {steps + 2}/{steps + 2}" in output, "logs are followed"
    assert "'second' succeeded" in output
    assert runs.steps(config) == list(range(1, steps + 3))
    assert runs.events(config, "resumed")[0]["step"] == steps
    assert (runs.run_dir(config) / "export" / "model.safetensors").is_file()
