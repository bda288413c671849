"""Buffers in memory that processes share: real processes write, read late, and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from raygrpo.weights.shared import KeptBuffer, SharedAddress, SharedGone, SharedPool, read_shared

SIZE = 100_000
# Shows a buffer of ones, then waits to be killed.
WRITER = f"""
import sys
from raygrpo.weights.shared import SharedPool
buffer = SharedPool().take({SIZE})
buffer.data[:] = 1
address = buffer.show()
print(address.pid, address.descriptor, address.name, address.edition.hex(), flush=True)
sys.stdin.read()
"""
# Holds the array at an address until told to end.
READER = """
import sys
from raygrpo.weights.shared import SharedAddress, read_shared
pid, descriptor, name, edition, size = sys.argv[1:]
array = read_shared(SharedAddress(pid=int(pid), descriptor=int(descriptor), name=name,
                             edition=bytes.fromhex(edition), num_bytes=int(size)))
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


def start_reader(children: list[subprocess.Popen[str]], at: SharedAddress) -> int:
    """Has another process hold a buffer; the sum of its bytes."""
    where = (str(at.pid), str(at.descriptor), at.name, at.edition.hex(), str(at.num_bytes))
    return int(start(children, READER, *where))


def test_what_another_process_reads_is_not_written_until_it_ends(
    children: list[subprocess.Popen[str]],
) -> None:
    pool = SharedPool()
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
    pool = SharedPool()
    buffer = pool.take(SIZE)
    buffer.data[:] = 1
    old = buffer.show()
    pool.give_back(buffer)
    again = pool.take(SIZE)
    assert again is buffer
    with pytest.raises(SharedGone, match="written again"):  # while it is being written
        read_shared(old)
    again.data[:] = 2
    new = again.show()
    with pytest.raises(SharedGone, match="written again"):
        read_shared(old)
    assert (read_shared(new) == 2).all()


def test_a_buffer_outlives_its_writer_where_it_is_held(
    children: list[subprocess.Popen[str]],
) -> None:
    pid, descriptor, name, edition = start(children, WRITER).split()
    address = SharedAddress(
        pid=int(pid),
        descriptor=int(descriptor),
        name=name,
        edition=bytes.fromhex(edition),
        num_bytes=SIZE,
    )
    held = KeptBuffer(address)
    os.kill(int(pid), signal.SIGKILL)
    children[0].wait(30)
    with pytest.raises(SharedGone, match="cannot be opened"):
        read_shared(address)
    assert (held.read() == 1).all()
    assert start_reader(children, held.address) == SIZE  # a third process, from who holds it


def test_another_file_under_the_same_number_is_not_taken_for_the_buffer() -> None:
    pool = SharedPool()
    buffer = pool.take(SIZE)
    address = buffer.show()
    for wrong in (replace(address, name="raygrpo-other"), replace(address, descriptor=0)):
        with pytest.raises(SharedGone):
            read_shared(wrong)


def test_readers_cannot_write_and_kernels_find_aligned_memory() -> None:
    pool = SharedPool()
    buffer = pool.take(SIZE)
    buffer.data[:] = 5
    array = read_shared(buffer.show())
    assert array.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    assert np.array_equal(array, buffer.data)
