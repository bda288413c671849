"""Whole buckets in memory that the processes of one host share: written once, read in place.

A segment is a memory file without a name (memfd), which others open through ``/proc``. The kernel
frees it when the last process that has it open or mapped lets go, however that process ends: a
dead writer takes nothing along, and nothing is left behind. Fresh memory costs several times what
a copy into it does, so segments are written again: a reader holds a shared lock (flock) as long as
its array lives, a writer needs the exclusive one. A mark at the front, new at each writing, tells a
reader that comes too late.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import uuid
from dataclasses import dataclass

import numpy as np

from raygrpo.errors import InfraError
from raygrpo.types import ByteArray

_MARK_BYTES = 16
_HEADER_BYTES = 64  # what engines align tensors to


class SegmentGone(InfraError):
    """What was asked for is not there: written anew since, or on another host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a segment is open: a process of this host and its file descriptor."""

    pid: int
    descriptor: int
    name: str
    mark: bytes
    num_bytes: int


class Segment:
    """Memory to write a bucket into."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._name = f"raygrpo-{uuid.uuid4().hex}"
        size = _HEADER_BYTES + capacity
        file = os.memfd_create(self._name)
        try:
            os.ftruncate(file, size)
            self._mapped = mmap.mmap(file, size)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        self.data = np.empty(0, np.uint8)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def begin(self, num_bytes: int) -> bool:
        """Makes ``data`` an array of this size to write, unless somebody reads what was here."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._mapped[:_MARK_BYTES] = uuid.uuid4().bytes
        self.data = np.frombuffer(self._mapped, np.uint8, num_bytes, _HEADER_BYTES)
        return True

    def show(self) -> Address:
        """Lets others read what has been written; not to be written until `end`."""
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return Address(
            pid=os.getpid(),
            descriptor=self._file,
            name=self._name,
            mark=self._mapped[:_MARK_BYTES],
            num_bytes=self.data.nbytes,
        )

    def end(self) -> None:
        """This process does not need the bytes any more; others may."""
        fcntl.flock(self._file, fcntl.LOCK_UN)


class SegmentPool:
    """Segments to write buckets into; what is given back serves again once nobody reads it."""

    def __init__(self) -> None:
        self._returned: list[Segment] = []

    def take(self, num_bytes: int) -> Segment:
        """A segment whose ``data`` has this size."""
        capacity = 1 << max(num_bytes - 1, 0).bit_length()  # only what is written takes memory
        for place, segment in enumerate(self._returned):
            if segment.capacity == capacity and segment.begin(num_bytes):
                return self._returned.pop(place)
        segment = Segment(capacity)
        segment.begin(num_bytes)
        return segment

    def give_back(self, segment: Segment) -> None:
        """Takes a segment back that this process does not read any more."""
        segment.end()
        self._returned.append(segment)


class HeldSegment:
    """A segment that this process keeps for others to read.

    Raises:
        SegmentGone: it is not at this address any more.
    """

    def __init__(self, address: Address) -> None:
        self._file = _open(address)
        self.address = Address(
            pid=os.getpid(),
            descriptor=self._file,
            name=address.name,
            mark=address.mark,
            num_bytes=address.num_bytes,
        )

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self) -> ByteArray:
        """The bytes in place, read-only; they stay as they are while the array lives."""
        return _map(self._file, self.address)


def read_segment(address: Address) -> ByteArray:
    """`HeldSegment.read` of the segment at this address.

    Raises:
        SegmentGone: it is not there any more.
    """
    file = _open(address)
    try:
        return _map(file, address)  # which has the file open, and so locked, by itself
    finally:
        os.close(file)


def _open(address: Address) -> int:
    path = f"/proc/{address.pid}/fd/{address.descriptor}"
    try:
        # The name tells it from a file of another host's process of the same number.
        if os.readlink(path) != f"/memfd:{address.name} (deleted)":
            raise SegmentGone("a segment of the weights is not there any more")
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentGone(f"a segment of the weights cannot be opened: {error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.pread(file, _MARK_BYTES, 0) != address.mark:
            raise SegmentGone("a segment of the weights was written anew")
    except (BlockingIOError, SegmentGone) as error:
        os.close(file)
        raise SegmentGone("a segment of the weights was written anew") from error
    return file


def _map(file: int, address: Address) -> ByteArray:
    size = _HEADER_BYTES + address.num_bytes
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    mapped = mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ)
    return np.frombuffer(mapped, np.uint8, address.num_bytes, _HEADER_BYTES)
