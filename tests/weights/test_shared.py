"""Segments in memory that processes share: real processes write, read late, and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from raygrpo.weights.shared import Address, HeldSegment, SegmentGone, SegmentPool, read_segment

SIZE = 100_000
# Shows a segment of ones, then waits to be killed.
WRITER = f"""
import sys
from raygrpo.weights.shared import SegmentPool
segment = SegmentPool().take({SIZE})
segment.data[:] = 1
address = segment.show()
print(address.pid, address.descriptor, address.name, address.mark.hex(), flush=True)
sys.stdin.read()
"""
# Holds the array at an address until told to end.
READER = """
import sys
from raygrpo.weights.shared import Address, read_segment
pid, descriptor, name, mark, size = sys.argv[1:]
array = read_segment(Address(pid=int(pid), descriptor=int(descriptor), name=name,
                             mark=bytes.fromhex(mark), num_bytes=int(size)))
print(int(array.astype("int64").sum()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to be ended however the test ends."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate(timeout=30)


def start(children: list[subprocess.Popen[str]], code: str, *arguments: str) -> str:
    """Starts a process; its first line."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    children.append(child)
    assert child.stdout is not None
    return child.stdout.readline()


def start_reader(children: list[subprocess.Popen[str]], at: Address) -> int:
    """Has another process hold a segment; the sum of its bytes."""
    where = (str(at.pid), str(at.descriptor), at.name, at.mark.hex(), str(at.num_bytes))
    return int(start(children, READER, *where))


def test_what_another_process_reads_is_not_written_until_it_ends(
    children: list[subprocess.Popen[str]],
) -> None:
    pool = SegmentPool()
    first = pool.take(SIZE)
    first.data[:] = 3
    assert start_reader(children, first.show()) == 3 * SIZE
    pool.give_back(first)
    second = pool.take(SIZE)
    assert second is not first
    children[0].kill()  # with its lock in hand: the kernel lets go of it
    children[0].wait(30)
    assert pool.take(SIZE) is first


def test_a_reader_that_comes_after_the_next_writing_is_told() -> None:
    pool = SegmentPool()
    segment = pool.take(SIZE)
    segment.data[:] = 1
    old = segment.show()
    pool.give_back(segment)
    again = pool.take(SIZE)
    assert again is segment
    with pytest.raises(SegmentGone, match="written anew"):  # while it is being written
        read_segment(old)
    again.data[:] = 2
    new = again.show()
    with pytest.raises(SegmentGone, match="written anew"):
        read_segment(old)
    assert (read_segment(new) == 2).all()


def test_a_segment_outlives_its_writer_where_it_is_held(
    children: list[subprocess.Popen[str]],
) -> None:
    pid, descriptor, name, mark = start(children, WRITER).split()
    address = Address(
        pid=int(pid),
        descriptor=int(descriptor),
        name=name,
        mark=bytes.fromhex(mark),
        num_bytes=SIZE,
    )
    held = HeldSegment(address)
    os.kill(int(pid), signal.SIGKILL)
    children[0].wait(30)
    with pytest.raises(SegmentGone, match="cannot be opened"):
        read_segment(address)
    assert (held.read() == 1).all()
    assert start_reader(children, held.address) == SIZE  # a third process, from who holds it


def test_another_file_under_the_same_number_is_not_taken_for_the_segment() -> None:
    pool = SegmentPool()
    segment = pool.take(SIZE)
    address = segment.show()
    for wrong in (replace(address, name="raygrpo-other"), replace(address, descriptor=0)):
        with pytest.raises(SegmentGone):
            read_segment(wrong)


def test_readers_cannot_write_and_kernels_find_aligned_memory() -> None:
    pool = SegmentPool()
    segment = pool.take(SIZE)
    segment.data[:] = 5
    array = read_segment(segment.show())
    assert array.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    assert np.array_equal(array, segment.data)
