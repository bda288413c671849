"""Freed memory is used again, instead of being given back and zeroed anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading
from raygrpo.heap import keep_heap

kept = keep_heap()
sizes = [40_000_000, 90_000_000, 3_000_000]

def work():
    def faults_of_a_round():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in sizes:
            bytearray(size)[::4096] = bytes(1 + (size - 1) // 4096)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    rounds = [faults_of_a_round() for _ in range(3)]
    print(kept, rounds[-1])

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
# Pages of 4 KiB of the largest two, each touched once in a round.
PAGES = (40_000_000 + 90_000_000) // 4096


def faults(**environment: str) -> tuple[bool, int]:
    """Whether the heap is kept, and the page faults of a thread's third round."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, check=True, timeout=60, env={**plain, **environment},
    )  # fmt: skip
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the heap of glibc")
def test_memory_that_was_freed_is_not_zeroed_anew() -> None:
    kept, count = faults()
    assert kept
    assert count < PAGES / 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the heap of glibc")
def test_what_the_environment_says_of_the_heap_is_left_alone() -> None:
    kept, count = faults(MALLOC_MMAP_THRESHOLD_="1048576")
    assert not kept
    assert count >= PAGES
