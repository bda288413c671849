"""The heap of a process whose tensors are on the CPU."""

from __future__ import annotations

import ctypes
import os

# From malloc.h; all sizes in bytes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1  # mallopt takes an int
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_heap() -> bool:
    """Has malloc keep memory that was freed, up to the peak, for the tensors to come.

    Otherwise glibc maps each large tensor anew and gives it back when it is freed, and the system
    fills its pages with zeros once more: a fifth of an update's time. False, and nothing is
    changed, where the C library is another one or its heap is set in the environment already.
    Source: mallopt(3).
    """
    if any(name in os.environ for name in _SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # Arenas of other threads map what exceeds their 64 MB: one for all, of any size.
    wanted = {_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: _LARGEST, _M_TRIM_THRESHOLD: _LARGEST}
    return all(mallopt(name, value) for name, value in wanted.items())
