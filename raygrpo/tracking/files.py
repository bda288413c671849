"""The run directory's two logs: metrics.jsonl, one object a step, and events.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from raygrpo.errors import StorageError
from raygrpo.storage.run_dir import write_atomically


class _JsonLines:
    """A file of JSON objects that is appended to; a line is on disk when `write` returns.

    Raises:
        StorageError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            _end_torn_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error}") from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object. NaN and infinities become null: JSON has neither."""
        try:
            self._file.write(json.dumps(_finite(row), allow_nan=False, default=str) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error}", "free some space") from error

    def close(self) -> None:
        """Closes the file; more than once is fine. Each line was on disk before."""
        with contextlib.suppress(OSError):  # closing tries a failed, reported write again
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsFile(_JsonLines):
    """metrics.jsonl: each step of the run once, in order.

    A line is ``{"reward": 0.5, ..., "step": 7}``. The run goes on from ``resume_step``: the rows
    after that step, which a killed run logged, are cut off; None cuts all rows off.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        last_step = -1 if resume_step is None else resume_step
        kept = [row for row in read_metrics(path) if row["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        super().__init__(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one step."""
        self.write({**metrics, "step": step})


class EventsFile(_JsonLines):
    """events.jsonl: ``{"time": 1.7e9, "kind": "worker_replaced", ...}``, seconds since 1970."""

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Appends one event."""
        self.write({"time": time.time(), "kind": kind, **fields})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a crash tore; none without a file.

    Raises:
        StorageError: the file cannot be read, or another line is no JSON object.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # torn: a whole line ends in a newline
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise StorageError(
                f"line {number} of {path} is no step's metrics", "remove the line, or the file"
            )
        rows.append(row)
    return rows


def _end_torn_line(path: Path) -> None:
    """Ends a last line that a crash tore, so that the next row starts on a line of its own."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
