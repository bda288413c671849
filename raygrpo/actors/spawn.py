"""Plain classes become actors here, so that each can be made and tested without Ray."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
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


def on_sigterm(prepare: Callable[[], Any]) -> None:
    """Has ``prepare`` run as a SIGTERM reaches this actor's process, before Ray ends it.

    Ray then takes no more calls, but lets those that run end and answers them. Handlers belong to
    the main thread, which no code of an actor runs on, so this hooks into what Ray's own ends in.
    """
    from ray._private import worker

    name = "raise_sys_exit_with_custom_error_message"
    end = getattr(worker, name, None)
    if end is None:
        return

    def prepare_and_end(*arguments: Any, **options: Any) -> None:
        prepare()
        end(*arguments, **options)

    setattr(worker, name, prepare_and_end)
