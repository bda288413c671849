"""The weight store: a long-lived actor that owns published weights, so that a dead learner loses
nothing and generators pull whenever they need to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrpo.actors.spawn import spawn
from raygrpo.types import ByteArray, Version, WeightsManifest
from raygrpo.weights.chain import Stored, VersionChain


class WeightStoreActor:
    """A `VersionChain` whose buckets are objects that this actor owns."""

    def __init__(self) -> None:
        self._chain = VersionChain()

    def put(self, version: Version, index: int, data: ByteArray, encoded: bool = False) -> None:
        """Takes bucket ``index`` of a version under way, as a delta (``encoded``) or whole."""
        self._chain.refuse_older(version)
        self._chain.put(version, index, ray.put(data), encoded=encoded)

    def commit(self, *manifests: WeightsManifest) -> None:
        """Makes a version readable, as whole, as a delta or as both, once its buckets are here."""
        self._chain.commit(manifests)

    def newest(self) -> Version | None:
        """The newest version; None while nothing has been published."""
        return self._chain.version

    def plan(self, have: Version | None = None) -> list[Stored]:
        """What to apply to get from ``have`` to the newest version, with references to buckets."""
        return self._chain.plan(have)


def start_store(labels: Mapping[str, str] | None = None) -> Any:
    """Starts the store on a node with these labels (the learner's), else on the driver's node.

    It restarts by itself, without what it held, and calls under way are made again: an empty store
    refuses deltas, and says to generators that the weights are lost, so that the learner publishes
    them whole. It holds bytes and needs no core of its own, so without a place it could land on any node: on
    one that is preempted, say, with all published weights.
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
