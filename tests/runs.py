"""Whole runs in processes of their own, on a tiny model: what the end-to-end tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from raygrpo.cli import app
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
DEADLINE_S = 280.0  # below pytest's own, on cores that other tests use too
SHARED: dict[str, str] = {}  # RAY_ADDRESS while a module's runs share a Ray (e2e/conftest.py)
# What Ray, and what it leaves behind when a test ends, says in the process of the tests.
RAY_IN_PROCESS = [
    pytest.mark.filterwarnings(f"ignore::{category}")
    for category in (
        "ResourceWarning",
        "FutureWarning",
        "DeprecationWarning",
        "pytest.PytestUnraisableExceptionWarning",
    )
]

REWARD = '''
"""Rewards completions by their share of digits: nearly every group differs."""


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
'''


def write_run(directory: Path, name: str, **changes: Any) -> Path:
    """A configuration (and, once, its model, data and reward) in ``directory``; returns its path.

    ``changes`` maps a section to keys of it.
    """
    model = directory / "model"
    if not model.exists():
        save_tiny_model(model, "llama", seed=3)
        rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
        (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (directory / "reward.py").write_text(REWARD)
    config: dict[str, Any] = {
        "run_dir": str(directory / name),
        "deterministic": True,
        "model": {"path": str(model)},
        "data": {"source": str(directory / "rows.jsonl"), "max_prompt_length": 16},
        "sampling": {"num_completions": 4, "max_tokens": 6},
        "rewards": [{"func": f"{directory / 'reward.py'}:digits", "timeout_s": 60.0}],
        "train": {"steps": 5, "groups_per_step": 4, "tokens_per_microbatch": 64},
        "optimizer": {"lr": 1e-2, "schedule": "linear"},
        "scorers": {"count": 1},
        "ray": {
            "address": "auto",
            "timeouts_s": {"start": 120.0, "generate": 60.0},
            "threads": {"learner": 1, "generator": 1},
        },
    }
    for section, keys in changes.items():
        merge = isinstance(keys, Mapping) and isinstance(config.get(section), dict)
        config[section] = {**config[section], **keys} if merge else keys
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def reward(directory: Path, name: str, source: str) -> dict[str, str]:
    """A reward section for the function ``name``, whose ``source`` goes to a file of its own."""
    path = directory / f"{name}.py"
    path.write_text(source)
    return {"func": f"{path}:{name}"}


def environment() -> dict[str, str]:
    """The environment of a process of a test's own: one thread, no hub, the shared Ray if any."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **SHARED}


def python(
    *arguments: str, cwd: Path = ROOT, expected: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user would in ``cwd``."""
    done = subprocess.run(
        [sys.executable, *arguments],
        timeout=DEADLINE_S,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected, done.stdout[-3000:] + done.stderr[-4000:]
    return done


def start(config: Path, *overrides: str, command: str = "train") -> subprocess.Popen[str]:
    """Starts ``raygrpo`` on a configuration; its output goes to a file beside it."""
    with config.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "raygrpo", command, str(config), *overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            cwd=ROOT,
        )


def finish(
    process: subprocess.Popen[str], config: Path, expected: int = 0, deadline_s: float = DEADLINE_S
) -> str:
    """Waits for a run's end; returns its output, which is shown when the exit code is wrong."""
    try:
        code = process.wait(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    output = config.with_suffix(".log").read_text()
    assert code == expected, f"exit code {code}, not {expected}:\n{output[-6000:]}"
    return output


def run(config: Path, *overrides: str, expected: int = 0, deadline_s: float = DEADLINE_S) -> str:
    """Runs to the end; returns the output."""
    return finish(start(config, *overrides), config, expected, deadline_s)


def serial(config: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Runs examples/serial.py on a configuration; its trained weights and its output."""
    directory = run_dir(config).with_name(f"{run_dir(config).name}-serial")
    done = python("examples/serial.py", str(config), f"--run_dir={directory}")
    return load_file(directory / "serial" / "model.safetensors"), done.stdout


def invoke(*arguments: str, expected: int = 0) -> str:
    """Runs a command of ``raygrpo`` in this process, which has the libraries loaded; its output."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHARED.items():
            patch.setenv(name, value)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == expected, result.output[-3000:]
    return result.output


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], what: str) -> None:
    """Waits until ``condition`` holds while the run goes on."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.01)


def wait_for_step(process: subprocess.Popen[str], config: Path, step: int) -> None:
    """Waits until the metrics of a step are logged."""
    wait_for(process, lambda: any(row["step"] == step for row in metrics(config)), f"step {step}")


def wait_for_event(process: subprocess.Popen[str], config: Path, kind: str) -> None:
    """Waits until there is an event of a kind."""
    wait_for(process, lambda: bool(events(config, kind)), f"the event {kind}")


def kill_worker(config: Path, name: str) -> None:
    """Kills a process of a run, as it was started."""
    (started,) = events(config, "started")
    os.kill(started["pids"][name], signal.SIGKILL)


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, a torn last line left out; empty when it is missing."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics(config: Path) -> list[dict[str, Any]]:
    """The metrics of a run by step."""
    return rows(run_dir(config) / "metrics.jsonl")


def steps(config: Path) -> list[int]:
    """The steps whose metrics are logged, in order."""
    return [row["step"] for row in metrics(config)]


def events(config: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    return [row for row in rows(run_dir(config) / "events.jsonl") if row["kind"] == kind]


def run_dir(config: Path) -> Path:
    """The directory of a run."""
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def weights(config: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    return load_file(run_dir(config) / "export" / "model.safetensors")


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ: {different[:3]}"
