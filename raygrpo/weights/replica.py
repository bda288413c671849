"""A generator's copy of the weights: two sets of buffers, the version in use and the next one.

`Replica.stage` builds the next version beside the one in use, from what the store says to apply,
and may run on another thread meanwhile; `Replica.commit` then makes it the one in use. A whole
bucket in memory that nobody writes to, as shared memory is, is used in place, without a copy, and
unread: `raygrpo.weights.buckets.unpack` verifies it.

The set that was in use before is written again by the next `stage`, so its arrays may serve as an
engine's memory until then. Between two deltas that set lags by one version: it is brought up by the
deltas that made the other one, which touch a few percent of it, where a copy would touch all.
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
# Past this share of a bucket a copy of the version in use is quicker than applying deltas again.
MAX_TRAIL_FRAC = 0.03

# A published version and the array of each of its buckets.
WeightLink = tuple[WeightsManifest, Sequence[ByteArray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A whole version, which its ``manifest`` calls full or adapter."""

    manifest: WeightsManifest
    buckets: tuple[ByteArray, ...]


class Replica:
    """The version in use, and room for the next; ``threads`` build buckets at a time."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._current: Staged | None = None
        self._spare: Staged | None = None
        self._trail: tuple[WeightLink, ...] = ()  # what takes the spare to the version in use
        self._links: tuple[WeightLink, ...] = ()  # what takes the version in use to the staged one
        self._staged: Staged | None = None

    @property
    def version(self) -> Version | None:
        """The version in use; None before the first commit."""
        return self._current.manifest.version if self._current else None

    @property
    def current(self) -> Staged:
        """The version in use.

        Raises:
            InfraError: there is none yet.
        """
        if self._current is None:
            raise InfraError("no version of the weights is held", "pull a whole version")
        return self._current

    def held(self) -> list[ByteArray]:
        """The arrays of the version in use; none before the first commit."""
        return list(self._current.buckets) if self._current else []

    def stage(self, links: Sequence[WeightLink]) -> Staged:
        """Builds the version that the last link is of.

        Args:
            links: oldest first: a whole version and deltas on it, or deltas on the version in use.

        Raises:
            InfraError: links that do not follow from each other or from the version in use, or that
                go back. The version in use is as it was.
            WeightsCorrupt: bytes that are not what was published. Likewise.
        """
        self._check(links)
        # From here to a commit, nothing is known of the spare's bytes.
        self._staged, trail, self._trail = None, self._trail, ()
        manifest = links[-1][0]
        buckets = tuple(
            links[-1][1][index] if _serves(links[-1], index) else self._take(index, spec)
            for index, spec in enumerate(manifest.buckets)
        )

        def build(index: int) -> None:
            spec, bucket = manifest.buckets[index], buckets[index]
            self._build(index, bucket, links, trail)
            if delta.checksum(bucket) != spec.checksum:
                raise WeightsCorrupt(f"{_name(spec)} is corrupt", "the weights are published again")

        # Those in place are verified by whoever unpacks them.
        written = [index for index, bucket in enumerate(buckets) if bucket.flags.writeable]
        with ThreadPoolExecutor(self._threads, "build") as workers:
            for _ in workers.map(build, written):
                pass
        whole = tuple(replace(spec, encoded_bytes=None) for spec in manifest.buckets)
        first = links[0][0] if self._is_whole(links) else self.current.manifest
        self._staged = Staged(
            manifest=replace(manifest, kind=first.kind, base_version=None, buckets=whole),
            buckets=buckets,
        )
        self._links = () if self._is_whole(links) else tuple(map(_deltas, links))
        return self._staged

    def commit(self, staged: Staged) -> None:
        """Makes what was staged last the version in use.

        Raises:
            InfraError: something else was staged since.
        """
        if staged is not self._staged:
            raise InfraError(f"version {tuple(staged.manifest.version)} is not staged")
        self._spare, self._current, self._staged = _writable(self._current), staged, None
        self._trail, self._links = self._links, ()

    @staticmethod
    def _is_whole(links: Sequence[WeightLink]) -> bool:
        return links[0][0].kind != "delta"

    def _check(self, links: Sequence[WeightLink]) -> None:
        """Refuses a chain that does not fit, before anything is written."""
        held = self._current.manifest if self._current else None
        for number, (manifest, arrays) in enumerate(links):
            name = f"version {tuple(manifest.version)}"
            if held is not None and manifest.version <= held.version:
                raise InfraError(f"{name} is not newer than {tuple(held.version)}, which is held")
            if manifest.kind == "delta":
                if held is None or manifest.base_version != held.version:
                    raise InfraError(
                        f"{name} is a delta on {manifest.base_version}, not on what is held",
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

    def _take(self, index: int, spec: BucketSpec) -> ByteArray:
        """The spare's buffer, or a new one."""
        if self._spare is not None and index < len(self._spare.buckets):
            buffer = self._spare.buckets[index]
            if buffer.nbytes == spec.num_bytes:
                return buffer
        room = np.empty(spec.num_bytes + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        return room[start : start + spec.num_bytes]

    def _build(
        self, index: int, out: ByteArray, links: Sequence[WeightLink], trail: Sequence[WeightLink]
    ) -> None:
        whole = [i for i, link in enumerate(links) if link[0].buckets[index].encoded_bytes is None]
        if whole:
            manifest, arrays = links[whole[-1]]
            np.copyto(out, arrays[index])
            _patch(index, out, manifest.buckets[index], links[whole[-1] + 1 :])
            return
        in_use = self.current
        num_bytes = sum(manifest.buckets[index].sent_bytes for manifest, _ in trail)
        if (
            self._spare
            and out is self._spare.buckets[index]
            and trail
            and num_bytes <= MAX_TRAIL_FRAC * out.nbytes
        ):
            _patch(index, out, self._spare.manifest.buckets[index], trail)
        else:
            np.copyto(out, in_use.buckets[index])
        _patch(index, out, in_use.manifest.buckets[index], links)


def _serves(link: WeightLink, index: int) -> bool:
    """Whether a whole bucket can be used where it is, since nobody writes to it."""
    data = link[1][index]
    is_whole = link[0].buckets[index].encoded_bytes is None
    return is_whole and not data.flags.writeable and data.ctypes.data % ALIGNMENT == 0


def _writable(held: Staged | None) -> Staged | None:
    """What was held, without arrays that others own: those are let go."""
    if held is None:
        return None
    none = np.empty(0, np.uint8)
    buckets = tuple(data if data.flags.writeable else none for data in held.buckets)
    return replace(held, buckets=buckets)


def _patch(index: int, out: ByteArray, held: BucketSpec, links: Sequence[WeightLink]) -> None:
    """Applies one bucket's deltas in order to the bytes that ``held`` describes."""
    expected = held.checksum
    for manifest, arrays in links:
        spec = manifest.buckets[index]
        expected = delta.patch(out, arrays[index], expected)
        if expected != spec.checksum:
            raise WeightsCorrupt(f"{_name(spec)} is corrupt: its delta is of another version")


def _deltas(link: WeightLink) -> WeightLink:
    """A link without its whole buckets, which would stay in shared memory for nothing."""
    manifest, arrays = link
    none = np.empty(0, np.uint8)
    pairs = zip(manifest.buckets, arrays, strict=True)
    return manifest, [none if spec.encoded_bytes is None else data for spec, data in pairs]


def _name(spec: BucketSpec) -> str:
    return f"bucket of {spec.tensors[0].name}"
