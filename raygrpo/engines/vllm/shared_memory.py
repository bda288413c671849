"""A version's buckets in anonymous shared memory, for worker processes of the same machine."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from raygrpo.errors import InfraError
from raygrpo.types import ByteArray
from raygrpo.weights.buckets import unpack
from raygrpo.weights.types import BucketSpec, WeightsManifest

ALIGNMENT = 64


class SharedBuckets:
    """A manifest's buckets, copied and verified, in a memory file that has no name.

    The kernel frees the memory when the last process that has it open or mapped lets go, however
    that process ends. Other processes of the same user open the memory at `path`, while this object
    is open.

    Raises:
        InfraError: too few or too many buckets, or a corrupt one.
    """

    def __init__(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        self.manifest = manifest
        self._fd = os.memfd_create("raygrpo-weights")
        try:
            os.ftruncate(self._fd, _offsets(manifest.buckets)[-1])
            self._fill(buckets)
        except BaseException:
            self.close()
            raise

    def _fill(self, buckets: Iterable[ByteArray]) -> None:
        arrays = iter(buckets)
        specs = self.manifest.buckets
        for number, offset in enumerate(_offsets(specs)[:-1]):
            data = next(arrays, None)
            if data is None:
                raise InfraError(f"{number} of {len(specs)} buckets came")
            with memoryview(np.ascontiguousarray(data).data) as bytes_left:
                done = 0
                while done < len(bytes_left):
                    done += os.pwrite(self._fd, bytes_left[done:], offset + done)
        if next(arrays, None) is not None:
            raise InfraError(f"more than {len(specs)} buckets came")
        for _ in read_buckets(self.path, specs):  # verifies the bytes in the memory
            pass

    @property
    def path(self) -> str:
        """The path at which any process of this user and machine opens the memory."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Lets the memory go; mappings in other processes stay until these drop them."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_buckets(path: str, specs: Sequence[BucketSpec]) -> Iterator[tuple[str, Tensor]]:
    """Names and read-only views of all tensors at ``path``; each bucket is verified first.

    Raises:
        InfraError: a bucket has other bytes than were published.
    """
    offsets = _offsets(specs)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), offsets[-1], prot=mmap.PROT_READ)
    for spec, offset in zip(specs, offsets, strict=False):
        yield from unpack(spec, np.frombuffer(mapped, np.uint8, spec.num_bytes, offset))


def _offsets(specs: Sequence[BucketSpec]) -> list[int]:
    """The start of each bucket, and at last the end of all."""
    offsets = [0]
    for spec in specs:
        offsets.append(offsets[-1] + -(-spec.num_bytes // ALIGNMENT) * ALIGNMENT)
    return offsets
