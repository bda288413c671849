"""A run's configuration, tracker and events, for tests of tracking."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.tracker import Tracker
from tests import builders


def run_config(tmp_path: Path, **tracking: Any) -> RunConfig:
    return builders.config(
        run_dir=str(tmp_path / "run"),
        rewards=[{"func": "exact", "params": {"api_key": "hunter2", "max_tokens": 5}}],
        train={"steps": 3},
        tracking=tracking,
    )


@contextmanager
def tracked(tmp_path: Path, resume_step: int | None = None, **tracking: Any) -> Iterator[Tracker]:
    """A tracker that records in ``tmp_path/run``, and is closed at the end."""
    config = run_config(tmp_path, **tracking)
    run_dir = RunDir.claim(config)
    tracker = Tracker(run_dir.root, config, resume_step=resume_step, file=io.StringIO())
    yield tracker
    tracker.close()
    run_dir.release()


def events_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
