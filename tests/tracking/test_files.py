"""The files of metrics and events: each line once, whole, and on disk."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from raygrpo.errors import StorageError
from raygrpo.tracking.files import EventsFile, MetricsFile, read_metrics


def test_metrics_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=None) as file:
        for step in range(5):
            file.log(step, {"reward": step / 10})
    with MetricsFile(path, resume_step=2) as file:
        file.log(3, {"reward": 9.0})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["reward"] for row in rows] == [0.0, 0.1, 0.2, 9.0]
    with MetricsFile(path, resume_step=None):
        pass
    assert read_metrics(path) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=None) as file:
        file.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 0.5}


@pytest.mark.parametrize("tear", [1, 7, 20])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, tear: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=None) as file:
        file.log(1, {"reward": 0.25})
        file.log(2, {"reward": 0.50})
    path.write_bytes(path.read_bytes()[:-tear])
    with MetricsFile(path, resume_step=5) as file:
        file.log(2, {"reward": 0.75})
    assert [row["reward"] for row in read_metrics(path)] == [0.25, 0.75]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(StorageError, match="line 2"):
        MetricsFile(path, resume_step=3)


def test_events_are_appended_even_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventsFile(path) as file:
        file.log("started", {"pids": [1, 2], "where": tmp_path})
    with path.open("a") as torn:
        torn.write('{"time": 1, "ki')
    with EventsFile(path) as file:
        file.log("resumed", {"step": 4, "value": math.nan})
    lines = path.read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[2])
    assert (first["kind"], first["where"]) == ("started", str(tmp_path))
    assert (last["kind"], last["value"]) == ("resumed", None)
    assert first["time"] <= last["time"]


def test_logged_steps_survive_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = f"""
        import pathlib, sys
        from raygrpo.tracking.files import MetricsFile
        file = MetricsFile(pathlib.Path({str(path)!r}), resume_step=None)
        for step in range(1, 1_000_000):
            file.log(step, {{"reward": step / 7}})
            print(step, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        told = [int(process.stdout.readline()) for _ in range(20)][-1]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told
