"""Plain classes become actors here, so that each can be made and tested without Ray."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import ray


def spawn(cls: type, *arguments: Any, **options: Any) -> Any:
    """Starts an actor of ``cls`` and returns its handle.

    It never restarts by itself, unless ``options`` say so: a blank actor would pass for one that
    holds weights.
    """
    limits = {"max_restarts": 0, "max_task_retries": 0}
    return _actor_class(cls).options(**{**limits, **options}).remote(*arguments)


def log_to(path: str | None) -> None:
    """Sends this process's output, and that of children it starts, to a file; None leaves it."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def log_path(logs: Path | None, name: str) -> str | None:
    """Where the actor ``name`` logs; None leaves its output to Ray."""
    return None if logs is None else str(logs / f"{name}.log")


@functools.cache
def _actor_class(cls: type) -> Any:
    return ray.remote(cls)
