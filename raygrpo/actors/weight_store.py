"""The weight store: a long-lived actor that owns published weights, and its handle.

A dead learner loses nothing, since the store copies or maps each bucket. Generators pull whenever
they need to. The store waits for nobody; a publish unblocks the loads that the driver asks for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrpo.actors.futures import resolve
from raygrpo.actors.process import spawn
from raygrpo.errors import WeightsCorrupt
from raygrpo.types import ByteArray, Version
from raygrpo.weights.chain import StoredVersion, VersionChain
from raygrpo.weights.replica import WeightLink
from raygrpo.weights.shared import KeptBuffer, SharedAddress, SharedGone, read_shared
from raygrpo.weights.types import WeightsManifest

# How often buckets may be gone when they are read: newer publishes may overtake a reader.
_MAX_PULLS = 10


class WeightStoreActor:
    """A `VersionChain` whose buckets are objects or shared memory that this actor keeps."""

    def __init__(self) -> None:
        self._chain = VersionChain()
        self._held: WeakValueDictionary[bytes, _Held] = WeakValueDictionary()

    def put(self, version: Version, index: int, data: ByteArray, encoded: bool) -> None:
        """Takes bucket ``index`` of a version under way, as a delta (``encoded``) or whole."""
        self._chain.refuse_older(version)
        self._chain.put(version, index, ray.put(data), encoded=encoded)

    def adopt(self, version: Version, index: int, address: SharedAddress) -> bool:
        """Maps a whole bucket in this host's shared memory; False if it is on another host."""
        self._chain.refuse_older(version)
        try:
            held = _Held(address)
        except SharedGone:
            return False
        self._held[address.edition] = held
        self._chain.put(version, index, held)
        return True

    def commit(self, *manifests: WeightsManifest) -> None:
        """Makes a version readable, as whole, as a delta or as both, once its buckets are here."""
        self._chain.commit(manifests)

    def forget(self) -> None:
        """Drops all versions, which are corrupt; a version under way stays."""
        self._chain.forget()

    def newest(self) -> Version | None:
        """The newest version; None while nothing has been published."""
        return self._chain.version

    def plan(self, have: Version | None = None) -> list[StoredVersion]:
        """The versions to apply on ``have`` to reach the newest one.

        Each bucket is a reference to an object, or an address in shared memory.
        """
        return [
            (manifest, tuple(r.address if isinstance(r, _Held) else r for r in refs))
            for manifest, refs in self._chain.plan(have)
        ]

    def fetch(self, edition: bytes) -> list[Any]:
        """A reference to a bucket in shared memory, for a reader on another host.

        Raises:
            SharedGone: the store has let go of the bucket.
        """
        held = self._held.get(edition)
        if held is None:
            raise SharedGone("a bucket of the weights is gone")
        held.ref = held.ref or ray.put(held.read())
        return [held.ref]


class _Held(KeptBuffer):
    """A bucket in shared memory, and the object made of it for other hosts."""

    ref: Any = None


@dataclass(frozen=True, slots=True)
class StoreHandle:
    """The weight store as the driver, the learner and the generators see it.

    ``actor`` is a `WeightStoreActor`; ``timeout_s`` is the deadline of each blocking call.
    """

    actor: Any
    timeout_s: float

    def newest(self) -> Version | None:
        """The newest version; None in an empty store."""
        version: Version | None = self._answer(self.actor.newest.remote())
        return version

    def put(
        self, version: Version, index: int, data: ByteArray, *, encoded: bool
    ) -> Callable[[], None]:
        """Sends a bucket; returns a function that waits until the store has it."""
        return partial(self._answer, self.actor.put.remote(version, index, data, encoded))

    def adopt(self, version: Version, index: int, address: SharedAddress) -> Callable[[], bool]:
        """Offers a bucket in shared memory; the answer of a store on another host is False."""
        return partial(self._answer, self.actor.adopt.remote(version, index, address))

    def commit(self, *manifests: WeightsManifest) -> None:
        """Makes a version readable."""
        self._answer(self.actor.commit.remote(*manifests))

    def forget(self) -> None:
        """Has the store drop all versions; does not wait."""
        self.actor.forget.remote()

    async def pull(self, have: Version | None) -> list[WeightLink]:
        """The links from ``have`` to the newest version; none if ``have`` is the newest.

        Buckets in this host's memory are read in place, others come through Ray. A bucket may be
        gone when it is read, because newer versions came or the store lost its process. Then the
        pull starts again.

        Raises:
            WeightsLost: the store is empty.
            WeightsCorrupt: the store does not give the buckets that it lists.
        """
        for _ in range(_MAX_PULLS):
            versions: list[StoredVersion] = await self.actor.plan.remote(have)
            try:
                return [
                    (manifest, await asyncio.gather(*map(self._read, parts)))
                    for manifest, parts in versions
                ]
            except (SharedGone, ray.exceptions.ObjectLostError) as error:
                last = error
        raise WeightsCorrupt(f"buckets of the weights were gone {_MAX_PULLS} times: {last}")

    async def _read(self, part: Any) -> ByteArray:
        if isinstance(part, SharedAddress):
            try:
                return read_shared(part)
            except SharedGone:
                (part,) = await self.actor.fetch.remote(part.edition)
        data: ByteArray = await part
        return data

    def close(self) -> None:
        """Ends the store, and with it the weights in it."""
        ray.kill(self.actor)

    def _answer(self, ref: Any) -> Any:
        return resolve(ref, "weight store", self.timeout_s)


def start_store(
    labels: Mapping[str, str] | None = None, *, timeout_s: float = 600.0
) -> StoreHandle:
    """Starts the store on a node with these labels (the learner's), else on the driver's node.

    Ray restarts the store by itself, empty, and makes calls under way again. An empty store refuses
    deltas and tells generators that the weights are lost, so that the learner publishes a whole
    version. The store needs no core of its own. Without a place it could land on any node, for
    example on a preemptible one, which would take all published weights along.
    """
    restarts = {"max_restarts": -1, "max_task_retries": -1}
    place: dict[str, Any] = {"label_selector": dict(labels)} if labels else {}
    if not labels:
        here = ray.get_runtime_context().get_node_id()
        place["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    return StoreHandle(spawn(WeightStoreActor, num_cpus=0, **place, **restarts), timeout_s)
