"""Plain classes become actors here, so that each can be made and tested without Ray."""

from __future__ import annotations

import functools
from typing import Any

import ray


def spawn(cls: type, *arguments: Any, **options: Any) -> Any:
    """Starts an actor of ``cls`` and returns its handle.

    It never restarts by itself: a blank actor would pass for one that holds weights.
    """
    limits = {"max_restarts": 0, "max_task_retries": 0}
    return _actor_class(cls).options(**limits, **options).remote(*arguments)


@functools.cache
def _actor_class(cls: type) -> Any:
    return ray.remote(cls)
