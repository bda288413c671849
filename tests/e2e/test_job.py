"""Training as a submitted job on a running cluster: logs, exit codes, stop and resume."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests import runs

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
STEPS = 200


class Head:
    """A head of our own: ports, directory and token that no other Ray on the machine has."""

    def __init__(self, token: str) -> None:
        # Not pytest's directory: the paths of Ray's sockets in it would be too long.
        self.temp = tempfile.mkdtemp(prefix="rg", dir="/tmp")
        gcs, self.dashboard, agent = free_ports(3)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        without = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={self.temp}"),
                *("--include-dashboard=true", f"--dashboard-port={self.dashboard}"),
                f"--dashboard-agent-listen-port={agent}",
            ],
            env=without,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def job(self, *arguments: str, timeout_s: float = runs.DEADLINE_S) -> tuple[int, str]:
        """Runs ``ray job ...``: its exit code and output."""
        done = subprocess.run(
            ["timeout", "-k", "5", str(timeout_s), RAY, "job", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def submit(
        self, directory: Path, *overrides: str, id: str, wait: bool = True
    ) -> tuple[int, str]:
        """Submits the training of ``directory``'s config.yaml, as the README says."""
        environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", "OMP_NUM_THREADS": "1"}}
        return self.job(
            *("submit", "--working-dir", str(directory), "--submission-id", id),
            *("--runtime-env-json", json.dumps(environment)),
            *(() if wait else ("--no-wait",)),
            *("--", "python", "-m", "raygrpo", "train", "config.yaml", *overrides),
        )

    def end(self) -> None:
        """Ends the head and what is left of it."""
        mine = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(mine, timeout=20)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=20)
        shutil.rmtree(self.temp, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    head = Head(secrets.token_hex(32))
    try:
        runs.wait_for(head.process, lambda: head.job("list", timeout_s=20)[0] == 0, "the head")
        yield head
    finally:
        head.end()


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
    config["ray"]["address"] = "auto"
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
    runs.wait_for(head.process, lambda: len(runs.metrics(config)) >= 3, "the third step")
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
    assert [row["step"] for row in runs.metrics(config)] == list(range(1, steps + 3))
    assert runs.events(config, "resumed")[0]["step"] == steps
    assert (runs.run_dir(config) / "export" / "model.safetensors").is_file()
