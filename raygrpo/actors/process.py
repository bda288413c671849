"""An actor's process: its start, its log, its threads, its heap and its end.

The heap matters on a CPU. glibc maps each large tensor afresh and unmaps it when it is freed, and
the system fills the pages with zeros each time. So malloc is told to keep freed memory for later
tensors, and to have one arena: arenas of other threads map whatever exceeds their 64 MB. A process
then stays at its peak. Settings of the heap in the environment win. Sources: mallopt(3),
malloc/arena.c of glibc 2.36.
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
from ray._private import worker

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
    """Runs ``call`` on a new thread, which then ends."""
    pool = ThreadPoolExecutor(1, name)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def spawn(cls: type, *arguments: Any, **options: Any) -> Any:
    """Starts an actor of ``cls`` and returns its handle.

    The actor never restarts by itself, unless ``options`` say so: a blank actor would pass for a
    loaded one.
    """
    limits = {"max_restarts": 0, "max_task_retries": 0}
    return _actor_class(cls).options(**{**limits, **options}).remote(*arguments)


def log_to(path: str | None) -> None:
    """Sends the output of this process and of its children to a file; None leaves it."""
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
    """Has ``prepare`` run when a SIGTERM reaches this actor's process, before Ray ends it.

    After a SIGTERM Ray takes no more calls, but answers those that run. Only the main thread may
    install a signal handler, and no code of an actor runs there. So this function wraps the last
    call of Ray's own handler; a test fails if Ray renames that call.
    """
    end = worker.raise_sys_exit_with_custom_error_message

    def prepare_and_end(*arguments: Any, **options: Any) -> None:
        prepare()
        end(*arguments, **options)

    worker.raise_sys_exit_with_custom_error_message = prepare_and_end
