"""The heap of processes whose tensors are on the CPU.

glibc maps each large tensor anew and gives it back when it is freed, and the system fills its pages
with zeros once more: a fifth of an update's time. So malloc is told to keep what was freed for the
tensors to come, and to have one arena, since those of other threads map what exceeds their 64 MB.
A process then stays at its peak. Where the environment says something of the heap, that holds.
Sources: mallopt(3), malloc/arena.c of glibc 2.36.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray

# Read by glibc when a process starts; thresholds in bytes, larger than any tensor.
KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MMAP_THRESHOLDS = (2**31 - 1, 2**25)  # the largest int; half a heap, the most of older ones
_NEVER = -1


def _is_set() -> bool:
    return any(name in os.environ for name in ("GLIBC_TUNABLES", *KEPT))


@contextmanager
def children_keep_heaps() -> Iterator[None]:
    """Processes that are started meanwhile, and theirs, keep their heaps from the beginning."""
    if _is_set():
        yield
        return
    os.environ.update(KEPT)
    try:
        yield
    finally:
        for name in KEPT:
            del os.environ[name]


def keep_heap() -> bool:
    """Has this process keep its heap from now on; threads that have an arena already stay there.

    False, and nothing is changed, where the C library is another one or its heap is set in the
    environment.
    """
    if _is_set():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_THRESHOLDS):
        return False
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_ARENA_MAX, 1)
    return True


T = TypeVar("T")


def in_new_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Runs ``call`` on a thread of its own, and ends the thread."""
    pool = ThreadPoolExecutor(1, name)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


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
