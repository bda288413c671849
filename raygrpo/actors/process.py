"""The heap of processes whose tensors are on the CPU.

glibc maps each large tensor anew and gives it back when it is freed, and the system fills its pages
with zeros once more: a fifth of an update's time. So malloc is told to keep what was freed for the
tensors to come, and to have one arena, since those of other threads map what exceeds their 64 MB.
A process then stays at its peak. Where the environment says something of the heap, that holds.
Sources: mallopt(3), malloc/arena.c of glibc 2.36.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

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
