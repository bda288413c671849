"""The weight store: a long-lived actor that owns published weights, so that a dead learner loses
nothing and generators pull whenever they need to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrpo.actors.spawn import spawn
from raygrpo.errors import InfraError
from raygrpo.types import ByteArray, Version, WeightsManifest

_KEPT_VERSIONS = 2

logger = logging.getLogger(__name__)


class WeightStoreActor:
    """Versions in order: older incarnations are refused, and only the newest versions are kept."""

    def __init__(self) -> None:
        self._versions: dict[Version, tuple[WeightsManifest, tuple[Any, ...]]] = {}
        self._incoming: dict[int, Any] = {}
        self._incoming_version: Version | None = None

    def put(self, version: Version, index: int, data: ByteArray) -> None:
        """Takes bucket ``index`` of a version under way, into an object that this actor owns."""
        self._refuse_older(version)
        if version != self._incoming_version:
            self._incoming, self._incoming_version = {}, version
        self._incoming[index] = ray.put(data)

    def commit(self, manifest: WeightsManifest) -> None:
        """Makes a version readable, once all of its buckets are here."""
        self._refuse_older(manifest.version)
        expected = set(range(len(manifest.buckets)))
        if self._incoming_version != manifest.version or set(self._incoming) != expected:
            raise InfraError(f"version {tuple(manifest.version)} is incomplete in the weight store")
        refs = tuple(self._incoming[index] for index in sorted(expected))
        self._versions[manifest.version] = (manifest, refs)
        self._incoming, self._incoming_version = {}, None
        for version in sorted(self._versions)[:-_KEPT_VERSIONS]:
            del self._versions[version]

    def latest(self) -> tuple[WeightsManifest, tuple[Any, ...]]:
        """The newest version: its manifest and a reference for each bucket."""
        if not self._versions:
            raise InfraError("the weight store is empty: nothing has been published")
        return self._versions[max(self._versions)]

    def _refuse_older(self, version: Version) -> None:
        newest = max(self._versions, default=None)
        if newest is not None and version <= newest:
            raise InfraError(
                f"version {tuple(version)} is not newer than {tuple(newest)}: "
                "a learner of an older incarnation is still publishing"
            )


def start_store(labels: Mapping[str, str] | None = None) -> Any:
    """Starts the store on a node with these labels (the learner's), else on the driver's node.

    It holds bytes and needs no core of its own, so without a place it could land on any node: on
    one that is preempted, say, with all published weights.
    """
    if labels:
        return spawn(WeightStoreActor, num_cpus=0, label_selector=dict(labels))
    here = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(here, soft=False)
    return spawn(WeightStoreActor, num_cpus=0, scheduling_strategy=place)


def end_store(store: Any) -> None:
    """Ends the store, and with it what it holds."""
    ray.kill(store)
