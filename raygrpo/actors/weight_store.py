"""The weight store: a long-lived actor that owns published weights, so that a dead learner loses
nothing and generators pull whenever they need to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrpo.actors.process import spawn
from raygrpo.errors import WeightsCorrupt
from raygrpo.types import ByteArray, Version
from raygrpo.weights.chain import Stored, VersionChain
from raygrpo.weights.replica import Link
from raygrpo.weights.shared import Address, HeldSegment, SegmentGone, read_segment
from raygrpo.weights.types import WeightsManifest

# How often buckets may be gone by the time that they are read: a publish may have overtaken it.
_MAX_PLANS = 10


class WeightStoreActor:
    """A `VersionChain` whose buckets are objects or shared memory that this actor keeps."""

    def __init__(self) -> None:
        self._chain = VersionChain()
        self._held: WeakValueDictionary[bytes, _Held] = WeakValueDictionary()

    def put(self, version: Version, index: int, data: ByteArray, encoded: bool = False) -> None:
        """Takes bucket ``index`` of a version under way, as a delta (``encoded``) or whole."""
        self._chain.refuse_older(version)
        self._chain.put(version, index, ray.put(data), encoded=encoded)

    def adopt(self, version: Version, index: int, address: Address) -> bool:
        """Takes a whole bucket that is in this host's memory where it is; False: it is not."""
        self._chain.refuse_older(version)
        try:
            held = _Held(address)
        except SegmentGone:
            return False
        self._held[address.mark] = held
        self._chain.put(version, index, held)
        return True

    def commit(self, *manifests: WeightsManifest) -> None:
        """Makes a version readable, as whole, as a delta or as both, once its buckets are here."""
        self._chain.commit(manifests)

    def forget(self) -> None:
        """Drops all versions, which are not what was published; a version under way stays."""
        self._chain.forget()

    def newest(self) -> Version | None:
        """The newest version; None while nothing has been published."""
        return self._chain.version

    def plan(self, have: Version | None = None) -> list[Stored]:
        """What to apply to get from ``have`` to the newest version, with references to buckets, or
        addresses (see `pull`)."""
        return [
            (manifest, tuple(r.address if isinstance(r, _Held) else r for r in refs))
            for manifest, refs in self._chain.plan(have)
        ]

    def fetch(self, mark: bytes) -> list[Any]:
        """A reference to a bucket for those to whom its address means nothing.

        Raises:
            SegmentGone: it is not kept any more.
        """
        held = self._held.get(mark)
        if held is None:
            raise SegmentGone("a bucket of the weights is not kept any more")
        held.ref = held.ref or ray.put(held.read())
        return [held.ref]


class _Held(HeldSegment):
    """A bucket in shared memory, and the object made of it for other hosts."""

    ref: Any = None


async def pull(store: Any, have: Version | None) -> list[Link]:
    """What leads from ``have`` to the store's newest version: empty where that is the newest.

    Buckets in memory of this host are read in place; the others come through Ray. What is gone by
    then (newer versions have come, or the store has lost its process) is asked for anew.

    Raises:
        WeightsLost: the store is empty.
        WeightsCorrupt: the store does not give what it says it has.
    """
    for _ in range(_MAX_PLANS):
        plan = await store.plan.remote(have)
        try:
            return [
                (manifest, await asyncio.gather(*(_open(store, part) for part in parts)))
                for manifest, parts in plan
            ]
        except (SegmentGone, ray.exceptions.ObjectLostError) as error:
            last = error
    raise WeightsCorrupt(f"buckets of the weights were gone {_MAX_PLANS} times: {last}")


async def _open(store: Any, part: Any) -> ByteArray:
    if isinstance(part, Address):
        try:
            return read_segment(part)
        except SegmentGone:
            (part,) = await store.fetch.remote(part.mark)
    data: ByteArray = await part
    return data


def start_store(labels: Mapping[str, str] | None = None) -> Any:
    """Starts the store on a node with these labels (the learner's), else on the driver's node.

    It restarts by itself, without what it held, and calls under way are made again: an empty store
    refuses deltas, and says to generators that the weights are lost, so that the learner publishes
    them whole. It holds bytes and needs no core of its own, so without a place it could land on any
    node: on one that is preempted, say, with all published weights.
    """
    restarts = {"max_restarts": -1, "max_task_retries": -1}
    if labels:
        return spawn(WeightStoreActor, num_cpus=0, label_selector=dict(labels), **restarts)
    here = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(here, soft=False)
    return spawn(WeightStoreActor, num_cpus=0, scheduling_strategy=place, **restarts)


def end_store(store: Any) -> None:
    """Ends the store, and with it what it holds."""
    ray.kill(store)
