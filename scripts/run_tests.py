"""Runs pytest, says how long it took beside the budget, and leaves no process behind.

Ray's processes and those of whole runs outlive a killed test. They become children of this process
(a subreaper), which kills them when pytest has ended, or when SIGTERM or Ctrl-C ends this process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

BUDGET_MIN = 25  # for scripts/test without arguments, on two cores with bfloat16 units
GRACE_S = 10.0  # for pytest's own end after Ctrl-C
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Ended(Exception):
    """A signal asks this process to end; ``args[0]`` is its number."""


def main(arguments: list[str]) -> int:
    """Runs ``pytest ARGUMENTS``; returns its exit code, or 128 + the number of a signal."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    started = time.monotonic()
    try:
        pytest = subprocess.Popen([sys.executable, "-m", "pytest", *arguments])
        try:
            code = wait(pytest)
        except Ended as ended:
            code = 128 + ended.args[0]
            stop(pytest)
    finally:
        kill_descendants()
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"time: {minutes} min {seconds} s; budget of the whole suite: {BUDGET_MIN} min")
    return code


def wait(pytest: subprocess.Popen[bytes]) -> int:
    """Waits for pytest; reaps the orphans that end before: tests wait for their ends too."""
    while True:
        pid, status = os.wait()
        if pid == pytest.pid:
            return os.waitstatus_to_exitcode(status)


def end(number: int, frame: FrameType | None) -> None:
    """Handles the first signal; later signals must not interrupt the killing."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise Ended(number)


def stop(pytest: subprocess.Popen[bytes]) -> None:
    """Lets pytest report what it has, as after Ctrl-C."""
    pytest.send_signal(signal.SIGINT)
    try:
        pytest.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pytest.kill()


def kill_descendants() -> None:
    """Kills until none is left: the orphans of each killed process come here."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(descendants, timeout=5.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
