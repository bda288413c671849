"""The console of a run: a live bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import IO, Any

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# (metric, label, format) in the order shown.
_SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("eval/greedy/reward", "greedy", "{:.3f}"),
    ("eval/reward", "eval", "{:.3f}"),
    ("completions/mean_length", "length", "{:.1f}"),
    ("loss", "loss", "{:.4f}"),
    ("timing/tokens_per_s", "tokens/s", "{:.0f}"),
    ("step_time", "s/step", "{:.2f}"),
)
_LIVE = ("reward", "greedy", "eval", "s/step")  # these fit beside a bar in 80 columns
_QUIET_EVENTS = frozenset({"started", "checkpoint", "run_end"})


class _Terminal(rich.console.Console):
    """A console that goes quiet when its reader goes away (``| head``, a closed window)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Console:
    """Progress of a run of ``steps`` steps, on ``file`` or standard output."""

    def __init__(self, steps: int, *, first_step: int = 0, file: IO[str] | None = None) -> None:
        self._console = _Terminal(file=file, highlight=False, markup=False, soft_wrap=True)
        self._steps = steps
        self._seen: dict[str, str] = {}
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("starting", total=steps, completed=first_step)
            self._progress.start()

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step. The bar keeps the last value of a metric that this step does not have."""
        now = {
            label: pattern.format(metrics[name])
            for name, label, pattern in _SHOWN
            if name in metrics and math.isfinite(metrics[name])
        }
        if self._progress is None:
            width = len(str(self._steps))
            self._console.print(f"step {step:>{width}}/{self._steps}  {_line(now)}")
            return
        self._seen |= now
        ordered = {label: self._seen[label] for label in _LIVE if label in self._seen}
        self._progress.update(self._task, completed=step, description=_line(ordered))

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Shows an event as one line, unless it belongs to a run's ordinary course."""
        if kind in _QUIET_EVENTS:
            return
        shown = {name: _first_line(value) for name, value in fields.items() if name != "traceback"}
        self._console.print(
            f"{kind.replace('_', ' ')}: " + ", ".join(f"{n} {v}" for n, v in shown.items())
        )

    def close(self) -> None:
        """Ends the live display; more than once is fine."""
        if self._progress is not None:
            self._progress.stop()


def _line(values: Mapping[str, str]) -> str:
    return "  ".join(f"{label} {value}" for label, value in values.items())


def _first_line(value: Any, limit: int = 160) -> str:
    lines = str(value).splitlines() or [""]
    return lines[0] if len(lines[0]) <= limit else f"{lines[0][:limit]}..."
