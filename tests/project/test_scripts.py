"""Ending the suite leaves no process of it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
MARKER = "RAYGRPO_SURVIVOR_MARKER"
# Ray with a worker, and a process that leaves its parent's session: what tests leave when killed.
HANGING_TEST = """
import subprocess, sys, time
from pathlib import Path
import ray

@ray.remote
class Worker:
    def ping(self): pass

def test_hangs():
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    worker = Worker.remote()
    ray.get(worker.ping.remote())
    pause = [sys.executable, "-c", "import signal; signal.pause()"]
    subprocess.Popen(pause, start_new_session=True)
    Path(__file__).with_name("started").touch()
    time.sleep(600)
"""


def survivors(mark: str) -> list[str]:
    """Command lines of the processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == mark and process.status() != "zombie":
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_all_processes_of_the_suite(tmp_path: Path, number: signal.Signals) -> None:
    """scripts/test replaces itself by the script that starts here, in a process of its own."""
    (tmp_path / "test_hanging.py").write_text(HANGING_TEST)
    mark = uuid.uuid4().hex
    suite = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "run_tests.py"), "--numprocesses=1", str(tmp_path)],
        env={**os.environ, MARKER: mark},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # Ray in a test's process writes warnings of the interpreter there.
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists():
        assert suite.poll() is None, suite.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    names = " ".join(survivors(mark))
    assert "raylet" in names and "signal.pause" in names, "there is something to end"
    suite.send_signal(number)
    output, _ = suite.communicate(timeout=60)
    assert suite.returncode == 128 + number
    assert "budget" in output
    assert survivors(mark) == []
