"""The published versions that the store keeps: the newest whole one, and the deltas around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raygrpo.errors import InfraError, WeightsLost
from raygrpo.types import Version
from raygrpo.weights.types import WeightsManifest

# A manifest and an opaque reference to the array of each bucket.
StoredVersion = tuple[WeightsManifest, tuple[Any, ...]]


class VersionChain:
    """Versions in rising order of (incarnation, step); an older version is refused.

    The chain keeps the newest whole version, every delta since, and as many deltas before as are
    fewer bytes than the whole version. A reader that lags further takes the whole version. So the
    chain keeps at most the bytes of two whole versions and of the deltas since the newest one,
    which the publisher bounds.
    """

    def __init__(self) -> None:
        self._whole: StoredVersion | None = None
        self._deltas: list[StoredVersion] = []  # each on the version before
        self._incoming: dict[tuple[int, bool], Any] = {}
        self._incoming_version: Version | None = None

    @property
    def version(self) -> Version | None:
        """The newest version."""
        newest = self._deltas[-1] if self._deltas else self._whole
        return newest[0].version if newest else None

    def put(self, version: Version, index: int, ref: Any, *, encoded: bool = False) -> None:
        """Takes bucket ``index`` of a version under way, as a delta (``encoded``) or whole.

        Raises:
            InfraError: the chain has this version or a newer one.
        """
        self.refuse_older(version)
        if version != self._incoming_version:
            self._incoming, self._incoming_version = {}, version
        self._incoming[index, encoded] = ref

    def commit(self, manifests: Sequence[WeightsManifest]) -> None:
        """Makes a version readable: as a whole one, a delta on the newest, or both.

        Raises:
            InfraError: a bucket is missing, the base is not the newest version, or the version is
                not newer. The readable versions stay readable.
        """
        (version,) = {manifest.version for manifest in manifests}
        self.refuse_older(version)
        stored = {manifest.kind == "delta": self._gather(manifest) for manifest in manifests}
        delta, whole = stored.get(True), stored.get(False, self._whole)
        if delta is not None and delta[0].base_version != self.version:
            raise InfraError(
                f"version {tuple(version)} is a delta on {delta[0].base_version}, "
                f"but {self.version} is the newest"
            )
        self._deltas = [*self._deltas, delta] if delta else []
        self._whole = whole
        self._incoming, self._incoming_version = {}, None
        self._trim()

    def forget(self) -> None:
        """Drops all readable versions; the buckets of a version under way stay."""
        self._whole, self._deltas = None, []

    def plan(self, have: Version | None) -> list[StoredVersion]:
        """The versions to apply on ``have``, oldest first, to reach the newest with few bytes.

        None if ``have`` is the newest. Deltas alone if the chain has all deltas since ``have``:
        deltas that outweigh the newest whole version are not kept.

        Raises:
            WeightsLost: nothing has been published, or the store lost its process.
        """
        if self._whole is None:
            raise WeightsLost("the weight store is empty: nothing has been published")
        if have == self.version:
            return []
        bases = [delta[0].base_version for delta in self._deltas]
        if have in bases:
            return self._deltas[bases.index(have) :]
        return [self._whole, *(d for d in self._deltas if d[0].version > self._whole[0].version)]

    def refuse_older(self, version: Version) -> None:
        """Raises InfraError unless the version is newer than all versions here."""
        newest = self.version
        if newest is not None and version <= newest:
            raise InfraError(
                f"version {tuple(version)} is not newer than {tuple(newest)}: "
                "a learner of an older incarnation is still publishing"
            )

    def _gather(self, manifest: WeightsManifest) -> StoredVersion:
        keys = [(i, spec.encoded_bytes is not None) for i, spec in enumerate(manifest.buckets)]
        refs = [self._incoming.get(key) for key in keys]
        # A bucket too many is as wrong as one too few.
        same = {index for index, _ in self._incoming} == {index for index, _ in keys}
        if self._incoming_version != manifest.version or not same or any(r is None for r in refs):
            raise InfraError(f"version {tuple(manifest.version)} is incomplete in the weight store")
        return manifest, tuple(refs)

    def _trim(self) -> None:
        assert self._whole is not None
        newest_whole = self._whole[0]
        before = [delta for delta in self._deltas if delta[0].version <= newest_whole.version]
        while before and _num_bytes(before) >= newest_whole.num_bytes:
            self._deltas.remove(before.pop(0))


def _num_bytes(links: Sequence[StoredVersion]) -> int:
    return sum(manifest.sent_bytes for manifest, _ in links)
