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
from typer.testing import CliRunner, Result

from raygrpo.cli import app
from tests.tiny import save_tiny_model

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


def start(config: Path, *overrides: str, command: str = "train") -> subprocess.Popen[str]:
    """Starts ``raygrpo`` on a configuration; its output goes to a file beside it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    environment |= SHARED
    with config.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "raygrpo", command, str(config), *overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )


def finish(
    process: subprocess.Popen[str],
    config: Path,
    expected: int = 0,
    deadline_s: float = DEADLINE_S,
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
    root = Path(__file__).parents[1]
    directory = run_dir(config).with_name(f"{run_dir(config).name}-serial")
    done = subprocess.run(
        [sys.executable, "examples/serial.py", str(config), f"--run_dir={directory}"],
        timeout=DEADLINE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(directory / "serial" / "model.safetensors"), done.stdout


def invoke(*arguments: str) -> Result:
    """Runs a command of ``raygrpo`` in this process, which has the libraries loaded."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHARED.items():
            patch.setenv(name, value)
        return CliRunner().invoke(app, arguments)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], what: str) -> None:
    """Waits until ``condition`` holds while the run goes on."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.01)


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, a torn last line left out; empty when it is missing."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics(config: Path) -> list[dict[str, Any]]:
    """The metrics of a run by step."""
    return rows(run_dir(config) / "metrics.jsonl")


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
