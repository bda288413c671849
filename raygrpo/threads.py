"""Threads that compute beside another one that does.

OpenMP keeps a team of workers for each thread that has ever computed, until that thread ends. Once
a process has more workers than cores, libgomp no longer spins before it sleeps: each of the
thousands of small kernels of a decode step then pays for being woken (a quarter of its speed on two
cores). So what computes now and then does it on a thread that ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_new_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Runs ``call`` on a thread of its own, and ends the thread."""
    pool = ThreadPoolExecutor(1, name)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future
