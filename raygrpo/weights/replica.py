"""A generator's copy of the published bytes: the version in use, and room for the next one.

`Replica.stage` builds the next version beside the one in use, from the store's links. It waits for
nothing and may run on another thread. `Replica.commit` makes the staged version the one in use.
A whole bucket in read-only shared memory is used in place, without a copy and unread:
`raygrpo.weights.buckets.unpack` verifies such a bucket.

The buffers of the version before are written again by the next `stage`. Until then they may serve
as an engine's memory. These buffers lag by one version. Deltas touch a few percent of the bytes, so
applying the last deltas again costs less than a copy of the version in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from raygrpo.errors import InfraError, WeightsCorrupt
from raygrpo.types import ByteArray, Version
from raygrpo.weights import delta
from raygrpo.weights.types import BucketSpec, WeightsManifest

# Where an engine's kernels expect its tensors to start.
ALIGNMENT = 64
# If the last deltas exceed this share of a bucket, a copy of the version in use is quicker.
MAX_REPEATED_FRAC = 0.03

# A published version and the array of each of its buckets: whole bytes or deltas.
WeightLink = tuple[WeightsManifest, Sequence[ByteArray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeVersion:
    """All bytes of a version, whose ``manifest`` is ``full`` or ``adapter``.

    ``deltas`` lead to this version from the one before; none if it came whole.
    """

    manifest: WeightsManifest
    buckets: tuple[ByteArray, ...]
    deltas: tuple[WeightLink, ...] = ()


class Replica:
    """The version in use and the staged one; ``threads`` build buckets at a time."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._current: WholeVersion | None = None
        self._staged: WholeVersion | None = None
        # The version before, whose buffers the next one is written into.
        self._before: WholeVersion | None = None

    @property
    def version(self) -> Version | None:
        """The version in use; None before the first commit."""
        return self._current.manifest.version if self._current else None

    @property
    def current(self) -> WholeVersion:
        """The version in use.

        Raises:
            InfraError: there is none yet.
        """
        if self._current is None:
            raise InfraError("no version of the weights is held", "pull a whole version")
        return self._current

    def stage(self, links: Sequence[WeightLink]) -> WholeVersion:
        """Builds the last link's version; an earlier staged one is dropped.

        Args:
            links: oldest first: a whole version and deltas on it, or deltas on the version in use.

        Raises:
            InfraError: links that do not follow from each other or from the version in use, or that
                go back. The version in use stays as it was.
            WeightsCorrupt: other bytes than were published. The version in use stays as it was.
        """
        self._check(links)
        # If this fails halfway, the buffers hold a mixture. Only `commit` makes them a base again.
        before, self._before, self._staged = self._before, None, None
        manifest = links[-1][0]
        buckets = tuple(
            links[-1][1][index]
            if _serves(links[-1], index)
            else _room(before, index, spec.num_bytes)
            for index, spec in enumerate(manifest.buckets)
        )

        def build(index: int) -> None:
            spec, bucket = manifest.buckets[index], buckets[index]
            self._build(index, bucket, links, before)
            if delta.checksum(bucket) != spec.checksum:
                raise WeightsCorrupt(f"{_name(spec)} is corrupt", "the weights are published again")

        # `unpack` verifies the buckets that are used in place.
        written = [index for index, bucket in enumerate(buckets) if bucket.flags.writeable]
        with ThreadPoolExecutor(self._threads, "build") as workers:
            for _ in workers.map(build, written):
                pass
        whole = tuple(replace(spec, encoded_bytes=None) for spec in manifest.buckets)
        is_whole = links[0][0].kind != "delta"
        kind = (links[0][0] if is_whole else self.current.manifest).kind
        self._staged = WholeVersion(
            manifest=replace(manifest, kind=kind, base_version=None, buckets=whole),
            buckets=buckets,
            deltas=() if is_whole else tuple(map(_deltas, links)),
        )
        return self._staged

    def commit(self) -> list[ByteArray]:
        """Makes the staged version the one in use; returns the arrays of the version before.

        Raises:
            InfraError: nothing is staged.
        """
        if self._staged is None:
            raise InfraError("no version is staged", "stage one first")
        old = self._current
        self._before, self._current, self._staged = _writable(old), self._staged, None
        return list(old.buckets) if old else []

    def _check(self, links: Sequence[WeightLink]) -> None:
        """Refuses links that do not fit, before anything is written."""
        held = self._current.manifest if self._current else None
        for number, (manifest, arrays) in enumerate(links):
            name = f"version {tuple(manifest.version)}"
            if held is not None and manifest.version <= held.version:
                raise InfraError(f"{name} is not newer than {tuple(held.version)}, which is held")
            if manifest.kind == "delta":
                if held is None or manifest.base_version != held.version:
                    raise InfraError(
                        f"{name} is a delta on {manifest.base_version}, which is not held",
                        "pull a whole version",
                    )
                if [b.tensors for b in manifest.buckets] != [b.tensors for b in held.buckets]:
                    raise InfraError(f"{name} has other tensors than its base")
            elif number:
                raise InfraError(f"{name} is whole, but comes after others")
            sizes = [spec.sent_bytes for spec in manifest.buckets]
            if [array.nbytes for array in arrays] != sizes:
                raise WeightsCorrupt(f"{name} is corrupt: buckets are missing or of other sizes")
            held = manifest
        if not links:
            raise InfraError("there is nothing to stage")

    def _build(
        self, index: int, out: ByteArray, links: Sequence[WeightLink], before: WholeVersion | None
    ) -> None:
        whole = [i for i, link in enumerate(links) if link[0].buckets[index].encoded_bytes is None]
        if whole:
            manifest, arrays = links[whole[-1]]
            np.copyto(out, arrays[index])
            _patch(index, out, manifest.buckets[index], links[whole[-1] + 1 :])
            return
        current = self.current
        num_bytes = sum(manifest.buckets[index].sent_bytes for manifest, _ in current.deltas)
        if (
            before
            and index < len(before.buckets)
            and out is before.buckets[index]
            and current.deltas
            and num_bytes <= MAX_REPEATED_FRAC * out.nbytes
        ):
            _patch(index, out, before.manifest.buckets[index], current.deltas)
        else:
            np.copyto(out, current.buckets[index])
        _patch(index, out, current.manifest.buckets[index], links)


def _room(before: WholeVersion | None, index: int, num_bytes: int) -> ByteArray:
    """The buffer of the version before, or a new one."""
    if before is not None and index < len(before.buckets):
        buffer = before.buckets[index]
        if buffer.nbytes == num_bytes:
            return buffer
    room = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + num_bytes]


def _serves(link: WeightLink, index: int) -> bool:
    """Whether a whole bucket can be used in place, since nobody writes to it."""
    data = link[1][index]
    is_whole = link[0].buckets[index].encoded_bytes is None
    return is_whole and not data.flags.writeable and data.ctypes.data % ALIGNMENT == 0


def _writable(version: WholeVersion | None) -> WholeVersion | None:
    """A version without its read-only arrays, which belong to others."""
    if version is None:
        return None
    none = np.empty(0, np.uint8)
    buckets = tuple(data if data.flags.writeable else none for data in version.buckets)
    return replace(version, buckets=buckets)


def _patch(index: int, out: ByteArray, held: BucketSpec, links: Sequence[WeightLink]) -> None:
    """Applies one bucket's deltas in order to the bytes that ``held`` describes."""
    expected = held.checksum
    for manifest, arrays in links:
        spec = manifest.buckets[index]
        expected = delta.patch(out, arrays[index], expected)
        if expected != spec.checksum:
            raise WeightsCorrupt(f"{_name(spec)} is corrupt: its delta is of another version")


def _deltas(link: WeightLink) -> WeightLink:
    """A link without its whole buckets, which would keep shared memory for nothing."""
    manifest, arrays = link
    none = np.empty(0, np.uint8)
    pairs = zip(manifest.buckets, arrays, strict=True)
    return manifest, [none if spec.encoded_bytes is None else data for spec, data in pairs]


def _name(spec: BucketSpec) -> str:
    return f"bucket of {spec.tensors[0].name}"
