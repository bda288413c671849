"""Publishing: from the learner's tensors to a version in the weight store, whole or as a delta.

The rule. The first version of a process, and so of an incarnation, is whole. After that a bucket
travels as a delta unless more than a certain share of its elements changed, or the delta is
not the smaller: on one machine (LOCAL_FRAC) past what coding and applying cost more time than
copies through shared memory; over a network (`delta.DENSE_FRAC`) past what a link of 1 Gbit/s
carries as soon. A version of which no bucket is a delta is whole. Once the deltas since the last
whole version outweigh it, a version goes both ways: the whole one serves those who come late or lag
far, the delta everybody else.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray

from raygrpo.errors import InfraError
from raygrpo.types import ByteArray, Version
from raygrpo.weights import delta
from raygrpo.weights.shared import Segment, SegmentPool
from raygrpo.weights.types import BucketSpec, Probe, WeightsManifest

if TYPE_CHECKING:
    from torch import Tensor

WholeKind = Literal["full", "adapter"]

LOCAL_FRAC = 0.03
_PUTS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """A finished publish: ``num_bytes`` are what a generator pulls that holds the version before.

    ``changed_frac`` is the share of elements whose bits changed; None without a version before.
    ``broken`` generators were sent it directly, and may be half-loaded: their names, and reasons.
    """

    version: Version
    kind: Literal["full", "delta", "adapter"]
    num_bytes: int
    full_bytes: int
    changed_frac: float | None
    broken: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """A bucket of the version under way, and what comparing it with the base brought."""

    spec: BucketSpec
    segment: Segment
    encoded: delta.Encoded | None

    @property
    def data(self) -> ByteArray:
        return self.segment.data


class Publisher:
    """Publishes one model's versions; keeps the bytes that it published last.

    They are written into shared memory, where a store on this host takes them from, and compared
    with what was written the time before: bucket i on a thread of its own while bucket i + 1 is
    gathered. A store on another host is sent them.
    """

    def __init__(self, store: Any, *, local: bool, timeout_s: float) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._max_changed_frac = LOCAL_FRAC if local else delta.DENSE_FRAC
        self._base: list[tuple[BucketSpec, Segment]] = []
        self._base_version: Version | None = None
        self._chain_bytes = 0
        self._segments = SegmentPool()
        self._same_host = True  # as far as is known
        self._puts: deque[tuple[Any, Callable[[], Any]]] = deque()

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
            InfraError: the store refuses it; the next version is whole then.
            GetTimeoutError: the store does not answer within the deadline.
        """
        # Until the store has this version, there is nothing that a delta could be based on.
        base, self._base = self._base, []
        self._puts.clear()
        newest = self._get(self._store.newest.remote())  # none where the store was lost meanwhile
        if newest is None or newest != self._base_version or version.incarnation != newest[0]:
            self._give_back(base)
            base = []
        whole = not base or self._chain_bytes > sum(spec.num_bytes for spec, _ in base)
        buckets: list[_Compared] = []
        for bucket in self._compare_all(tensors, base):
            self._send(version, len(buckets), bucket, whole=whole)
            self._give_back(base[len(buckets) : len(buckets) + 1])
            buckets.append(bucket)
        self._finish_puts(0)
        link, manifests = _manifests(version, self._base_version, buckets, kind, probe, whole=whole)
        try:
            self._get(self._store.commit.remote(*manifests))
        except InfraError:
            if self._get(self._store.newest.remote()) is not None:
                raise
            # The store was lost in the midst of this: the kept bytes are the version's own.
            link = self._send_again(link, [bucket.segment for bucket in buckets], kind)
            manifests = [link]
        self._base = [(bucket.spec, bucket.segment) for bucket in buckets]
        self._base_version = version
        is_whole = any(manifest.kind != "delta" for manifest in manifests)
        self._chain_bytes = 0 if is_whole else self._chain_bytes + link.sent_bytes
        return _report(link, buckets)

    def _compare_all(
        self, tensors: Iterable[tuple[str, Tensor]], base: list[tuple[BucketSpec, Segment]]
    ) -> Iterator[_Compared]:
        """Packs buckets into segments, and compares each with the base's."""
        from raygrpo.weights.buckets import make_buckets

        taken: deque[Segment] = deque()

        def take(num_bytes: int) -> ByteArray:
            taken.append(self._segments.take(num_bytes))
            return taken[-1].data

        held = iter(base)
        with ThreadPoolExecutor(1, "compare") as worker:
            before: Future[_Compared] | None = None
            for spec, _ in make_buckets(tensors, take=take):
                after = worker.submit(self._compare, spec, taken.popleft(), next(held, None))
                if before is not None:
                    yield before.result()
                before = after
            if before is not None:
                yield before.result()

    def _give_back(self, base: Iterable[tuple[BucketSpec, Segment]]) -> None:
        for _, segment in base:
            self._segments.give_back(segment)

    def _compare(
        self, spec: BucketSpec, segment: Segment, base: tuple[BucketSpec, Segment] | None
    ) -> _Compared:
        encoded = None
        if base is not None:
            old, held = base
            encoded = delta.compare(
                held.data,
                segment.data,
                old.checksum,
                spec.checksum,
                _itemsize(spec),
                self._max_changed_frac,
            )
        return _Compared(spec=spec, segment=segment, encoded=encoded)

    def _send(self, version: Version, index: int, bucket: _Compared, *, whole: bool) -> None:
        coded = bucket.encoded.data if bucket.encoded else None
        if coded is not None:
            ref = self._store.put.remote(version, index, np.frombuffer(coded, np.uint8), True)
            self._puts.append((ref, lambda: ref))
        if coded is None or whole:
            self._send_whole(version, index, bucket.segment)
        self._finish_puts(_PUTS_IN_FLIGHT)

    def _send_whole(self, version: Version, index: int, segment: Segment) -> None:
        def put() -> Any:
            return self._store.put.remote(version, index, segment.data)

        def adopt() -> Any:
            return self._store.adopt.remote(version, index, segment.show())

        self._puts.append((adopt() if self._same_host else put(), put))

    def _send_again(
        self, link: WeightsManifest, segments: Sequence[Segment], kind: WholeKind
    ) -> WeightsManifest:
        """Gives an empty store the whole version; returns its manifest."""
        specs = tuple(replace(spec, encoded_bytes=None) for spec in link.buckets)
        whole = replace(link, kind=kind, base_version=None, buckets=specs)
        for index, segment in enumerate(segments):
            self._send_whole(link.version, index, segment)
            self._finish_puts(_PUTS_IN_FLIGHT)
        self._finish_puts(0)
        self._get(self._store.commit.remote(whole))
        return whole

    def _finish_puts(self, num_left: int) -> None:
        while len(self._puts) > num_left:
            ref, put = self._puts.popleft()
            if self._get(ref) is False:  # a store on another host
                self._same_host = False
                self._get(put())

    def _get(self, ref: Any) -> Any:
        return ray.get(ref, timeout=self._timeout_s)


def _manifests(
    version: Version,
    base_version: Version | None,
    buckets: Sequence[_Compared],
    kind: WholeKind,
    probe: Probe | None,
    *,
    whole: bool,
) -> tuple[WeightsManifest, list[WeightsManifest]]:
    """What an up-to-date generator takes, and all that the store is given."""
    specs = tuple(bucket.spec for bucket in buckets)
    complete = WeightsManifest(
        version=version, kind=kind, base_version=None, buckets=specs, probe=probe
    )
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
    """The width, of those that deltas know, that most of a bucket's bytes have."""
    widths: Counter[int] = Counter()
    for tensor in spec.tensors:
        width = tensor.num_bytes // max(math.prod(tensor.shape), 1)
        widths[min(width, delta.WORD)] += tensor.num_bytes
    width = widths.most_common(1)[0][0]
    return width if width in (1, 2, 4, 8) else 1
