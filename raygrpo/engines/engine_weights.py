"""The way of a version into an engine: built from the store's links, staged, committed.

`EngineWeights` owns the published bytes of the version in use, on which the next delta is applied.
The engine owns its tensors, which may be views of those bytes. Staging waits for nothing and may
run beside decoding. A commit runs between two decode steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.types import ByteArray, Version
from raygrpo.weights.replica import Replica, WeightLink, WholeVersion
from raygrpo.weights.types import WeightsManifest

if TYPE_CHECKING:
    from raygrpo.weights.adapter import AdapterBase


class EngineWeights:
    """One engine's weights; ``threads`` build buckets at a time."""

    def __init__(self, engine: Engine, config: RunConfig, threads: int) -> None:
        self._engine, self._config = engine, config
        self._replica = Replica(threads)
        self._adapter_base: AdapterBase | None = None

    @property
    def version(self) -> Version | None:
        """The version in use; None before the first commit."""
        return self._replica.version

    @property
    def manifest(self) -> WeightsManifest:
        """The manifest of the version in use; InfraError before the first commit."""
        return self._replica.current.manifest

    def stage(self, links: Sequence[WeightLink]) -> None:
        """Builds the newest version beside the one in use; on any thread.

        Raises:
            InfraError: links that do not fit, or bytes that are corrupt; the version in use stays.
        """
        self._engine.stage_weights(*self._merged(self._replica.stage(links)))

    def commit(self) -> list[ByteArray]:
        """Puts the staged version into use; on the engine's thread, between two steps.

        Returns the arrays of the version before: unmapping them takes longer than the commit.
        """
        self._engine.commit_weights()
        return self._replica.commit()

    def load_again(self) -> None:
        """Loads the version in use into an engine that has given its weights up."""
        self._engine.load_weights(*self._merged(self._replica.current))

    def _merged(self, version: WholeVersion) -> tuple[WeightsManifest, Sequence[ByteArray]]:
        """The model's own tensors: a version of adapters is merged into the base weights."""
        if version.manifest.kind != "adapter":
            return version.manifest, version.buckets
        if self._adapter_base is None:
            # It imports torch, which simulated engines do without.
            from raygrpo.weights.adapter import AdapterBase

            self._adapter_base = AdapterBase(self._config)
        return self._adapter_base.full_version(version.manifest, version.buckets)
