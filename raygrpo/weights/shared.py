"""Whole buckets in memory that the processes of one host share: written once, read in place.

A `SharedBuffer` is a memory file without a name (memfd). Other processes open it through ``/proc``.
The kernel frees the memory when the last process that has it open or mapped lets go, however that
process ends. So a dead writer takes nothing along, and nothing is left behind.

Fresh memory costs several times as much as a copy into it, so buffers are written again. A reader
holds a shared lock (flock) as long as its array lives; a writer needs the exclusive lock. Each
writing puts a new edition at the front of the buffer, by which a late reader sees that its bytes
are gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import uuid
from dataclasses import dataclass, replace

import numpy as np

from raygrpo.errors import InfraError
from raygrpo.types import ByteArray

_EDITION_BYTES = 16
_HEADER_BYTES = 64  # what engines align tensors to


class SharedGone(InfraError):
    """The bytes at an address are gone, written again since, or on another host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAddress:
    """Where a buffer is open: a process of this host and its file descriptor.

    Example: process 4711, descriptor 17, ``raygrpo-3f...``, 16 bytes of edition, 67108864 bytes.
    """

    pid: int
    descriptor: int
    name: str
    edition: bytes
    num_bytes: int


class SharedBuffer:
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
        """Makes ``data`` a new array of this size; False while somebody reads the old bytes."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._mapped[:_EDITION_BYTES] = uuid.uuid4().bytes
        self.data = np.frombuffer(self._mapped, np.uint8, num_bytes, _HEADER_BYTES)
        return True

    def show(self) -> SharedAddress:
        """Lets others read the buffer, which must not be written until `end`."""
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return SharedAddress(
            pid=os.getpid(),
            descriptor=self._file,
            name=self._name,
            edition=self._mapped[:_EDITION_BYTES],
            num_bytes=self.data.nbytes,
        )

    def end(self) -> None:
        """Allows the next writing, as far as this process is concerned."""
        fcntl.flock(self._file, fcntl.LOCK_UN)


def share(data: ByteArray) -> SharedBuffer:
    """A copy of a bucket in shared memory."""
    buffer = SharedBuffer(data.nbytes)
    buffer.begin(data.nbytes)
    buffer.data[:] = data
    return buffer


class SharedPool:
    """Buffers to write buckets into. A returned buffer serves again once nobody reads it."""

    def __init__(self) -> None:
        self._returned: list[SharedBuffer] = []

    def take(self, num_bytes: int) -> SharedBuffer:
        """A buffer whose ``data`` has this size."""
        capacity = 1 << max(num_bytes - 1, 0).bit_length()  # untouched pages take no memory
        for place, buffer in enumerate(self._returned):
            if buffer.capacity == capacity and buffer.begin(num_bytes):
                return self._returned.pop(place)
        buffer = SharedBuffer(capacity)
        buffer.begin(num_bytes)
        return buffer

    def give_back(self, buffer: SharedBuffer) -> None:
        """Takes back a buffer that this process has finished reading."""
        buffer.end()
        self._returned.append(buffer)


class KeptBuffer:
    """A buffer that this process keeps for others to read.

    Raises:
        SharedGone: another edition, or nothing, is at this address.
    """

    def __init__(self, address: SharedAddress) -> None:
        self._file = _open(address)
        self.address = replace(address, pid=os.getpid(), descriptor=self._file)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self) -> ByteArray:
        """The bytes in place, read-only and unchanged while the array lives."""
        return _map(self._file, self.address)


def read_shared(address: SharedAddress) -> ByteArray:
    """The bytes at an address in place, read-only and unchanged while the array lives.

    Raises:
        SharedGone: another edition, or nothing, is at this address.
    """
    file = _open(address)
    try:
        return _map(file, address)  # the mapping keeps the file open, and so locked
    finally:
        os.close(file)


def _open(address: SharedAddress) -> int:
    path = f"/proc/{address.pid}/fd/{address.descriptor}"
    try:
        # The name tells it from a file of another host's process of the same number.
        if os.readlink(path) != f"/memfd:{address.name} (deleted)":
            raise SharedGone("a shared buffer of the weights is gone")
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SharedGone(f"a shared buffer of the weights cannot be opened: {error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.pread(file, _EDITION_BYTES, 0) != address.edition:
            raise SharedGone("a shared buffer of the weights was written again")
    except (BlockingIOError, SharedGone) as error:
        os.close(file)
        raise SharedGone("a shared buffer of the weights was written again") from error
    return file


def _map(file: int, address: SharedAddress) -> ByteArray:
    size = _HEADER_BYTES + address.num_bytes
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    mapped = mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ)
    return np.frombuffer(mapped, np.uint8, address.num_bytes, _HEADER_BYTES)
