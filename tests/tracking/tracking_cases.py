"""A run's configuration and events, for tests of tracking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raygrpo.config import RunConfig
from tests import builders


def run_config(tmp_path: Path, **tracking: Any) -> RunConfig:
    return builders.config(
        run_dir=str(tmp_path / "run"),
        rewards=[{"func": "exact", "params": {"api_key": "hunter2", "max_tokens": 5}}],
        train={"steps": 3},
        tracking=tracking,
    )


def events_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
