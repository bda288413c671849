"""Publishing: from the learner's tensors to a version in the weight store, whole or as a delta.

The publisher owns the bytes that it published last, and waits for the store only.

The first version of a publisher is whole, and so the first one of an incarnation. Later a bucket
travels as a delta, unless too many of its elements changed or the delta is not the smaller one.
The limit on one machine is LOCAL_FRAC: above it, coding and applying a delta cost more time than
copies through shared memory. The limit over a network is `delta.DENSE_FRAC`: above it, a link of
1 Gbit/s carries the whole bucket as soon. A version without any delta is whole.

When the deltas since the last whole version outweigh that version, the next version goes both ways.
The whole one serves generators that join late or lag far behind, the delta serves all others.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from torch import Tensor

from raygrpo.errors import InfraError
from raygrpo.types import ByteArray, Version
from raygrpo.weights import delta
from raygrpo.weights.buckets import BUCKET_BYTES, make_buckets
from raygrpo.weights.shared import SharedAddress, SharedBuffer, SharedPool
from raygrpo.weights.types import BucketSpec, Probe, PublishReport, WeightsManifest, WholeKind

LOCAL_FRAC = 0.03
_PUTS_IN_FLIGHT = 2


class Store(Protocol):
    """The weight store, as its publisher uses it.

    `put` and `adopt` return at once, with a function that waits for the store's answer. Every wait
    has a deadline.
    """

    def newest(self) -> Version | None:
        """The newest version; None in an empty store."""

    def put(
        self, version: Version, index: int, data: ByteArray, *, encoded: bool
    ) -> Callable[[], None]:
        """Sends bucket ``index`` of a version, as a delta (``encoded``) or whole."""

    def adopt(self, version: Version, index: int, address: SharedAddress) -> Callable[[], bool]:
        """Offers a whole bucket in shared memory; the answer of a store elsewhere is False."""

    def commit(self, *manifests: WeightsManifest) -> None:
        """Makes a version readable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """A bucket of the version under way, and its delta on the version before, if it has one."""

    spec: BucketSpec
    buffer: SharedBuffer
    encoded: delta.Encoded | None


class Publisher:
    """Publishes one model's versions; keeps the bytes that it published last.

    The publisher writes each bucket into shared memory, and compares it with the same bucket of the
    version before: bucket i on a thread of its own, while bucket i + 1 is gathered. A store on this
    host maps the shared memory; a store on another host is sent the bytes.
    """

    def __init__(self, store: Store, *, local: bool, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._store, self._bucket_bytes = store, bucket_bytes
        self._max_changed_frac = LOCAL_FRAC if local else delta.DENSE_FRAC
        self._base: list[tuple[BucketSpec, SharedBuffer]] = []
        self._base_version: Version | None = None
        self._delta_bytes = 0
        self._pool = SharedPool()
        self._same_host = True  # until the store says otherwise
        self._puts: deque[Callable[[], object]] = deque()  # each waits for one bucket's arrival

    def publish(
        self,
        version: Version,
        tensors: Iterable[tuple[str, Tensor]],
        kind: WholeKind = "full",
        probe: Probe | None = None,
    ) -> PublishReport:
        """Puts a version into the store bucket by bucket, then makes it readable.

        ``kind`` is what a whole version of these tensors is.

        Raises:
            InfraError: the store refuses the version, or is silent; the next version is whole then.
        """
        # Until the store has this version, a delta has no base.
        base, self._base = self._base, []
        self._puts.clear()
        newest = self._store.newest()  # None if the store was lost meanwhile
        if newest is None or newest != self._base_version or version.incarnation != newest[0]:
            self._give_back(base)
            base = []
        whole = not base or self._delta_bytes > sum(spec.num_bytes for spec, _ in base)
        buckets: list[_Compared] = []
        for bucket in self._compare_all(tensors, base):
            self._send(version, len(buckets), bucket, whole=whole)
            self._give_back(base[len(buckets) : len(buckets) + 1])
            buckets.append(bucket)
        self._finish_puts(0)
        link, manifests = _manifests(version, self._base_version, buckets, kind, probe, whole=whole)
        try:
            self._store.commit(*manifests)
        except InfraError:
            if self._store.newest() is not None:
                raise
            # The store was lost during this publish. The kept bytes are this version's.
            link = self._send_again(link, [bucket.buffer for bucket in buckets], kind)
            manifests = [link]
        self._base = [(bucket.spec, bucket.buffer) for bucket in buckets]
        self._base_version = version
        is_whole = any(manifest.kind != "delta" for manifest in manifests)
        self._delta_bytes = 0 if is_whole else self._delta_bytes + link.sent_bytes
        return _report(link, buckets)

    def _compare_all(
        self, tensors: Iterable[tuple[str, Tensor]], base: list[tuple[BucketSpec, SharedBuffer]]
    ) -> Iterator[_Compared]:
        """Packs buckets into shared memory, and compares each with the base's."""
        taken: deque[SharedBuffer] = deque()

        def take(num_bytes: int) -> ByteArray:
            taken.append(self._pool.take(num_bytes))
            return taken[-1].data

        held = iter(base)
        with ThreadPoolExecutor(1, "compare") as worker:
            before: Future[_Compared] | None = None
            for spec, _ in make_buckets(tensors, self._bucket_bytes, take):
                after = worker.submit(self._compare, spec, taken.popleft(), next(held, None))
                if before is not None:
                    yield before.result()
                before = after
            if before is not None:
                yield before.result()

    def _give_back(self, base: Iterable[tuple[BucketSpec, SharedBuffer]]) -> None:
        for _, buffer in base:
            self._pool.give_back(buffer)

    def _compare(
        self, spec: BucketSpec, buffer: SharedBuffer, base: tuple[BucketSpec, SharedBuffer] | None
    ) -> _Compared:
        encoded = None
        if base is not None:
            old, held = base
            encoded = delta.compare(
                held.data,
                buffer.data,
                old.checksum,
                spec.checksum,
                _itemsize(spec),
                self._max_changed_frac,
            )
        return _Compared(spec=spec, buffer=buffer, encoded=encoded)

    def _send(self, version: Version, index: int, bucket: _Compared, *, whole: bool) -> None:
        coded = bucket.encoded.data if bucket.encoded else None
        if coded is not None:
            data = np.frombuffer(coded, np.uint8)
            self._puts.append(self._store.put(version, index, data, encoded=True))
        if coded is None or whole:
            self._send_whole(version, index, bucket.buffer)
        self._finish_puts(_PUTS_IN_FLIGHT)

    def _send_whole(self, version: Version, index: int, buffer: SharedBuffer) -> None:
        put = partial(self._store.put, version, index, buffer.data, encoded=False)
        if not self._same_host:
            self._puts.append(put())
            return
        adopted = self._store.adopt(version, index, buffer.show())

        def finish() -> None:
            if not adopted():
                self._same_host = False
                put()()

        self._puts.append(finish)

    def _send_again(
        self, link: WeightsManifest, buffers: Sequence[SharedBuffer], kind: WholeKind
    ) -> WeightsManifest:
        """Gives an empty store the whole version; returns its manifest."""
        specs = tuple(replace(spec, encoded_bytes=None) for spec in link.buckets)
        whole = replace(link, kind=kind, base_version=None, buckets=specs)
        for index, buffer in enumerate(buffers):
            self._send_whole(link.version, index, buffer)
            self._finish_puts(_PUTS_IN_FLIGHT)
        self._finish_puts(0)
        self._store.commit(whole)
        return whole

    def _finish_puts(self, num_left: int) -> None:
        while len(self._puts) > num_left:
            self._puts.popleft()()


def _manifests(
    version: Version,
    base_version: Version | None,
    buckets: Sequence[_Compared],
    kind: WholeKind,
    probe: Probe | None,
    *,
    whole: bool,
) -> tuple[WeightsManifest, list[WeightsManifest]]:
    """The manifest for a generator that is up to date, and all manifests for the store."""
    specs = tuple(bucket.spec for bucket in buckets)
    complete = WeightsManifest(version=version, kind=kind, buckets=specs, probe=probe)
    coded = [bucket.encoded.data if bucket.encoded else None for bucket in buckets]
    if not any(coded):
        return complete, [complete]
    sparse = tuple(
        replace(spec, encoded_bytes=len(data) if data else None)
        for spec, data in zip(specs, coded, strict=True)
    )
    link = replace(complete, kind="delta", base_version=base_version, buckets=sparse)
    return link, [link, complete] if whole else [link]


def _report(link: WeightsManifest, buckets: Sequence[_Compared]) -> PublishReport:
    compared = [bucket.encoded for bucket in buckets if bucket.encoded]
    num_elements = sum(encoded.num_elements for encoded in compared)
    num_changed = sum(encoded.num_changed for encoded in compared)
    return PublishReport(
        version=link.version,
        kind=link.kind,
        num_bytes=link.sent_bytes,
        full_bytes=link.num_bytes,
        changed_frac=num_changed / num_elements if num_elements else None,
    )


def _itemsize(spec: BucketSpec) -> int:
    """The width in bytes of most of a bucket's elements; 1 if deltas do not know that width."""
    widths: Counter[int] = Counter()
    for tensor in spec.tensors:
        width = tensor.num_bytes // max(math.prod(tensor.shape), 1)
        widths[min(width, delta.WORD)] += tensor.num_bytes
    width = widths.most_common(1)[0][0]
    return width if width in (1, 2, 4, 8) else 1
