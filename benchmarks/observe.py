"""Watches one run from outside: when each step ended, and how much memory its processes held."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

# Reading the memory walks every page of a process, a tenth of a second of a core for one of several
# GB: more often, it would slow a side that has all cores at work, the more the more processes.
POLL_S, MEMORY_EVERY_S = 0.05, 10.0
MARK = "VS_TRL_RUN"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a side says of one of its steps; None for what follows from the step's seconds."""

    number: int
    reward: float
    other_s: float
    num_completion_tokens: int
    generate_s: float | None = None
    train_s: float | None = None


@dataclass(kw_only=True)
class Run:
    """A run as it was seen; times in seconds since the process started.

    ``ended_s`` is when each step had ended, ``ready_s`` when the first one could start.
    """

    side: str
    steps: list[Step] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    ready_s: float = 0.0
    peak_bytes: int = 0

    @property
    def step_seconds(self) -> list[float]:
        """Each step's seconds, from the end of the one before."""
        starts = [self.ready_s, *self.ended_s]
        return [end - start for start, end in zip(starts, self.ended_s, strict=False)]

    def split(self) -> list[tuple[float, float, float]]:
        """Seconds of generation, training and other of each step; the missing one is the rest."""
        parts = []
        for step, seconds in zip(self.steps, self.step_seconds, strict=True):
            known = (step.generate_s or 0.0) + (step.train_s or 0.0) + step.other_s
            rest = max(0.0, seconds - known)
            generate = rest if step.generate_s is None else step.generate_s
            train = rest if step.train_s is None else step.train_s
            parts.append((generate, train, step.other_s))
        return parts


def reached(steps: Sequence[Step], target: float, window: int) -> int | None:
    """The index of the step at which the mean reward over ``window`` steps reached ``target``."""
    rewards = [step.reward for step in steps]
    for end in range(window, len(rewards) + 1):
        if statistics.fmean(rewards[end - window : end]) >= target:
            return end - 1
    return None


class NewRows:
    """The rows appended to a JSON-lines file since the last look; a torn last line waits."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def __call__(self) -> list[dict[str, Any]]:
        if not self._path.is_file() or self._path.stat().st_size == self._read:
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._read += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]


def memory_bytes(mark: str, known: dict[int, bool]) -> int:
    """The proportional set size of all processes that have ``mark`` in their environment.

    The environment is inherited, whoever the parent is now; ``known`` remembers the answers.
    """
    total = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is somebody else's
            if process.pid not in known and (environment := process.environ()):
                known[process.pid] = environment.get(MARK) == mark
            # Between fork and exec there is no environment.
            if known.get(process.pid):
                total += process.memory_full_info().pss
    return total


def observe(
    side: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    rows: Path,
    parse: Callable[[dict[str, Any]], Step | None],
    log: Path,
    stop: Callable[[Sequence[Step]], bool],
    timeout_s: float,
) -> Run:
    """Runs ``command`` to its end, or until ``stop`` says that the steps so far are enough.

    Raises:
        RuntimeError: the command failed, or took longer than ``timeout_s``.
    """
    run, mark = Run(side=side), uuid.uuid4().hex
    environment = {**environment, MARK: mark}
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[1],
        )
    watch = _Watch(run=run, rows=NewRows(rows), parse=parse, start=start, mark=mark)
    events = rows.with_name("events.jsonl")
    try:
        while process.poll() is None and not stop(run.steps):
            watch.look(events)
            if time.monotonic() - start > timeout_s:
                raise RuntimeError(f"{side} took longer than {timeout_s:.0f} s; see {log}")
            time.sleep(POLL_S)
        if process.poll() is not None:
            watch.look(events)
            if process.returncode:
                raise RuntimeError(f"{side} ended with {process.returncode}:\n{_tail(log)}")
    finally:
        end(process)
    if not run.steps:
        raise RuntimeError(f"{side} reported no step:\n{_tail(log)}")
    return run


@dataclass(kw_only=True)
class _Watch:
    run: Run
    rows: NewRows
    parse: Callable[[dict[str, Any]], Step | None]
    start: float
    mark: str
    known: dict[int, bool] = field(default_factory=dict)
    sampled: float = -MEMORY_EVERY_S

    def look(self, events: Path) -> None:
        """Takes the rows that have come, and now and then the memory."""
        now = time.monotonic() - self.start
        for row in self.rows():
            step = self.parse(row)
            if step is not None:
                self.run.steps.append(step)
                self.run.ended_s.append(now)
            elif not self.run.ready_s:
                self.run.ready_s = now
        if not self.run.ready_s and events.is_file() and '"started"' in events.read_text():
            self.run.ready_s = now
        if now - self.sampled > MEMORY_EVERY_S:
            self.sampled = now
            self.run.peak_bytes = max(self.run.peak_bytes, memory_bytes(self.mark, self.known))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a run that is going on: first asked, then made to."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
