"""Versions from publisher to replica, without Ray: the publisher calls a store in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions
import torch

from raygrpo.actors.weight_store import StoreHandle
from raygrpo.errors import InfraError, WeightsCorrupt, WeightsLost
from raygrpo.types import ByteArray, Version
from raygrpo.weights.buckets import make_buckets, tensor_bytes
from raygrpo.weights.chain import VersionChain
from raygrpo.weights.publisher import Publisher
from raygrpo.weights.replica import ALIGNMENT, Replica, WeightLink
from raygrpo.weights.shared import SharedAddress, read_shared
from raygrpo.weights.types import PublishReport, WeightsManifest

BUCKET_BYTES = 20_000


class Store:
    """The store in memory, on the publisher's host or on another one."""

    def __init__(self, *, same_host: bool) -> None:
        self.chain, self.same_host = VersionChain(), same_host

    def newest(self) -> Version | None:
        return self.chain.version

    def put(
        self, version: Version, index: int, data: ByteArray, *, encoded: bool
    ) -> Callable[[], None]:
        return partial(self.chain.put, version, index, data.copy(), encoded=encoded)

    def adopt(self, version: Version, index: int, address: SharedAddress) -> Callable[[], bool]:
        if self.same_host:
            self.chain.put(version, index, read_shared(address))
        return lambda: self.same_host

    def commit(self, *manifests: WeightsManifest) -> None:
        self.chain.commit(manifests)


@pytest.fixture(params=[True, False], ids=["same host", "another host"])
def store(request: pytest.FixtureRequest) -> Store:
    return Store(same_host=request.param)


class Learner:
    """Tensors of several dtypes, a publisher of them, and their bytes of each version."""

    def __init__(self, store: Store, *, incarnation: int = 1, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.incarnation, self.step = incarnation, -1
        sizes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.uint8, "d": torch.bfloat16}
        self.tensors = {
            name: self._random(8_000 + 7 * i, dtype)
            for i, (name, dtype) in enumerate(sizes.items())
        }
        self._publisher = Publisher(store, local=False, bucket_bytes=BUCKET_BYTES)
        self.snapshots: dict[Version, list[bytes]] = {}

    def _random(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(count, dtype=dtype)
        tensor_bytes(values)[:] = self._rng.integers(0, 256, values.nbytes)
        return values

    def change(self, frac: float) -> None:
        """Changes the bits of a share of elements, to anything at all."""
        for tensor in self.tensors.values():
            chosen = torch.from_numpy(self._rng.random(len(tensor)) < frac)
            tensor[chosen] = self._random(int(chosen.sum()), tensor.dtype)

    def publish(self, frac: float = 0.004) -> PublishReport:
        self.change(frac)
        self.step += 1
        version = Version(self.incarnation, self.step)
        self.snapshots[version] = [
            data.tobytes() for _, data in make_buckets(self._named(), BUCKET_BYTES)
        ]
        return self._publisher.publish(version, self._named())

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()


def pull(store: Store, replica: Replica) -> list[str]:
    """Brings a replica to the newest version; returns the kinds of what was applied."""
    links = store.chain.plan(replica.version)
    if links:
        replica.stage(links)
        replica.commit()
    return [manifest.kind for manifest, _ in links]


def assert_holds(replica: Replica, learner: Learner) -> None:
    current = replica.current
    assert current.manifest.version == Version(learner.incarnation, learner.step)
    assert current.manifest.kind == "full"
    assert [b.tobytes() for b in current.buckets] == learner.snapshots[current.manifest.version]
    assert all(bucket.ctypes.data % ALIGNMENT == 0 for bucket in current.buckets)


def test_fifty_versions_equal_the_snapshots_whoever_pulls_when(store: Store) -> None:
    """One replica pulls each version, one now and then, and one is made anew at each."""
    learner, rng = Learner(store), np.random.default_rng(0)
    every, some = Replica(), Replica()
    for step in range(50):
        frac = float(rng.choice([0.0, 0.002, 0.02, 0.5]))
        assert learner.publish(frac).kind == ("delta" if step and frac < 0.5 else "full")
        pull(store, every)
        assert_holds(every, learner)
        if rng.random() < 0.3:
            pull(store, some)
            assert_holds(some, learner)
        late = Replica()
        pull(store, late)
        assert_holds(late, learner)


def test_a_step_at_a_time_two_sets_of_buffers_serve_by_turns(store: Store) -> None:
    learner, replica = Learner(store), Replica()
    seen = []
    for _ in range(6):
        learner.publish(0.002)
        before = [b.tobytes() for b in replica.current.buckets] if replica.version else []
        replica.stage(store.chain.plan(replica.version))
        if before:
            assert [b.tobytes() for b in replica.current.buckets] == before, "staging writes aside"
        replica.commit()
        seen.append(replica.current.buckets[0].ctypes.data)
    # The first, whole version is used in place where it is in shared memory.
    assert len(set(seen[1:])) == 2
    assert seen[1:3] * 2 == seen[1:5]


def test_the_first_version_is_whole_and_deltas_are_small(store: Store) -> None:
    learner = Learner(store)
    first, second = learner.publish(), learner.publish(0.01)
    assert (first.kind, first.num_bytes, first.changed_frac) == ("full", first.full_bytes, None)
    assert second.kind == "delta"
    assert second.num_bytes < 0.06 * second.full_bytes
    assert second.changed_frac == pytest.approx(0.01, rel=0.3)


def test_what_changed_everywhere_is_pushed_whole(store: Store) -> None:
    learner, replica = Learner(store), Replica()
    learner.publish()
    pull(store, replica)
    report = learner.publish(1.0)
    assert (report.kind, report.num_bytes) == ("full", report.full_bytes)
    assert report.changed_frac is not None
    assert report.changed_frac > 0.9
    assert pull(store, replica) == ["full"]
    assert_holds(replica, learner)


def test_the_plan_is_what_takes_fewer_bytes(store: Store) -> None:
    """Every plan against every other way through what was published."""
    learner = Learner(store)
    sizes, wholes, full = {}, {0}, learner.publish().full_bytes
    for step in range(1, 40):
        report = learner.publish(0.05)
        assert report.kind == "delta"
        sizes[step] = report.num_bytes
        wholes.add(store.chain.plan(None)[0][0].version.step)
        for have in range(step):
            plan = store.chain.plan(Version(1, have))
            chain = sum(sizes[i] for i in range(have + 1, step + 1))
            fresh = full + sum(sizes[i] for i in range(max(wholes) + 1, step + 1))
            assert sum(manifest.sent_bytes for manifest, _ in plan) == min(chain, fresh)
    assert len(wholes) > 2, "the chain was long enough for new whole versions"
    assert store.chain.plan(Version(1, 39)) == []
    # What is held: one whole version, the deltas since, and no more than its size before.
    plans = (store.chain.plan(Version(1, have)) for have in range(39))
    deltas = next(plan for plan in plans if plan[0][0].kind == "delta")
    assert sum(manifest.sent_bytes for manifest, _ in deltas) < 2 * full + max(sizes.values())
    assert deltas[0][0].version.step > 1


def test_a_restarted_learner_begins_whole_and_the_old_one_is_refused(store: Store) -> None:
    old, replica = Learner(store), Replica()
    for _ in range(3):
        old.publish()
    pull(store, replica)
    new = Learner(store, incarnation=2, seed=1)
    assert new.publish().kind == "full"
    with pytest.raises(InfraError, match="older incarnation is still publishing"):
        old.publish()
    assert new.publish().kind == "delta"
    assert pull(store, replica) == ["full", "delta"]
    assert_holds(replica, new)


def test_versions_never_move_backwards(store: Store) -> None:
    learner, replica = Learner(store), Replica()
    learner.publish()
    links = store.chain.plan(None)
    pull(store, replica)
    learner.step -= 1
    with pytest.raises(InfraError, match="not newer"):
        learner.publish()
    for version in (Version(1, 0), Version(0, 7)):
        with pytest.raises(InfraError, match="not newer"):
            replica.stage([(replace(links[0][0], version=version), links[0][1])])
    assert [b.tobytes() for b in replica.current.buckets] == [b.tobytes() for b in links[0][1]]


def flipped(links: list[WeightLink], place: int) -> list[WeightLink]:
    """The last link with one byte of its first bucket changed."""
    manifest, arrays = links[-1]
    data = arrays[0].copy()
    data[place] ^= 0x10
    return [*links[:-1], (manifest, [data, *arrays[1:]])]


def without_base(links: list[WeightLink]) -> list[WeightLink]:
    return links[1:]


def other_base(links: list[WeightLink]) -> list[WeightLink]:
    """Deltas that claim to be on what is held, but are not: the content's checksum tells."""
    manifest, arrays = links[1]
    return [(replace(manifest, base_version=Version(1, 1)), arrays)]


def other_sum(links: list[WeightLink]) -> list[WeightLink]:
    """The right bytes under the manifest of others."""
    manifest, arrays = links[0]
    first, *rest = manifest.buckets
    other = (replace(first, checksum=first.checksum ^ 1), *rest)
    return [(replace(manifest, buckets=other), arrays), *links[1:]]


def too_few(links: list[WeightLink]) -> list[WeightLink]:
    return [(links[0][0], links[0][1][:-1]), *links[1:]]


BAD: dict[str, tuple[Callable[[list[WeightLink]], list[WeightLink]], str]] = {
    "a delta's byte": (lambda links: flipped(links, 70), "corrupt"),
    "a delta's checksum": (lambda links: flipped(links, 5), "corrupt"),
    "a whole bucket's byte": (lambda links: flipped(links[:1], 70), "corrupt|another base"),
    "a base that is not held": (without_base, "is not held"),
    "a base of other bytes": (other_base, "another base"),
    "another version's checksum": (other_sum, "corrupt|another base"),
    "a missing bucket": (too_few, "corrupt: buckets are missing"),
    "nothing": (lambda links: [], "nothing to stage"),
    "a whole version after others": (lambda links: [*links[:2], links[0]], "not newer"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_replica_refuses_what_is_wrong_and_stays_whole(store: Store, what: str) -> None:
    learner, replica = Learner(store), Replica()
    learner.publish()
    learner.publish()
    pull(store, replica)
    before = [b.tobytes() for b in replica.current.buckets]
    newer = Learner(store, incarnation=2, seed=2)  # so that even the whole version is news
    newer.publish(0.01)
    newer.publish(0.01)
    newer.publish(0.01)
    links = store.chain.plan(None)
    assert [manifest.kind for manifest, _ in links] == ["full", "delta", "delta"]
    spoil, message = BAD[what]
    with pytest.raises(InfraError, match=message):
        replica.stage(spoil(list(links)))
    assert replica.version == Version(1, 1)
    assert [b.tobytes() for b in replica.current.buckets] == before
    pull(store, replica)
    assert_holds(replica, newer)
    newer.publish(0.01)
    pull(store, replica)
    assert_holds(replica, newer)


def test_a_stage_that_failed_halfway_leaves_no_trace(store: Store) -> None:
    """The first buckets are of the new version by then, the others of the one before."""
    learner, replica = Learner(store), Replica()
    for _ in range(3):
        learner.publish()
        pull(store, replica)
    learner.publish()
    ((manifest, arrays),) = store.chain.plan(replica.version)
    with pytest.raises(InfraError, match="corrupt"):
        replica.stage([(manifest, [*arrays[:-1], arrays[-1] ^ 1])])
    pull(store, replica)
    assert_holds(replica, learner)


def test_a_version_staged_and_never_committed_is_no_base(store: Store) -> None:
    learner, replica = Learner(store), Replica()
    learner.publish()
    pull(store, replica)
    learner.publish()
    replica.stage(store.chain.plan(replica.version))
    learner.publish()
    replica.stage(store.chain.plan(replica.version))
    replica.commit()
    assert_holds(replica, learner)
    with pytest.raises(InfraError, match="no version is staged"):
        replica.commit()


def test_the_store_refuses_what_it_cannot_serve(store: Store) -> None:
    learner = Learner(store)
    with pytest.raises(InfraError, match="empty"):
        store.chain.plan(None)
    learner.publish()
    learner.publish()
    manifest = store.chain.plan(Version(1, 0))[0][0]
    on_old = replace(manifest, version=Version(1, 2))  # its base is version (1, 0)
    for index, spec in enumerate(manifest.buckets):
        sparse = spec.encoded_bytes is not None
        store.chain.put(on_old.version, index, object(), encoded=sparse)
    with pytest.raises(InfraError, match="is a delta on"):
        store.chain.commit([on_old])
    with pytest.raises(InfraError, match="incomplete"):
        store.chain.commit([replace(on_old, version=Version(1, 3))])
    assert store.chain.version == Version(1, 1)
    assert learner.publish().version == Version(1, 2), "a version that was begun begins anew"
    with pytest.raises(InfraError, match="incomplete"):
        store.chain.put(Version(1, 3), 0, object())
        store.chain.commit([replace(manifest, version=Version(1, 3))])


def test_versions_that_were_forgotten_are_published_whole(store: Store) -> None:
    learner, replica = Learner(store), Replica()
    learner.publish()
    learner.publish()
    pull(store, replica)
    store.chain.forget()
    with pytest.raises(WeightsLost):
        store.chain.plan(replica.version)
    assert learner.publish().kind == "full"
    assert pull(store, replica) == ["full"]
    assert_holds(replica, learner)


class Forgetful:
    """A store whose first ``num_gone`` plans name buckets that are gone when they are read."""

    def __init__(self, num_gone: int) -> None:
        self.num_gone, self.num_plans = num_gone, 0
        self.plan = SimpleNamespace(remote=self._plan)

    async def _plan(self, have: Version | None) -> list[Any]:
        self.num_plans += 1
        return [("manifest", (self._bucket(gone=self.num_plans <= self.num_gone),))]

    async def _bucket(self, *, gone: bool) -> Any:
        if gone:  # the owner of deltas is the store, whose process died
            raise ray.exceptions.OwnerDiedError("00" * 28, None, "")
        return np.arange(3, dtype=np.uint8)


def test_buckets_that_died_with_the_store_are_asked_for_anew() -> None:
    store = Forgetful(2)
    ((_, (data,)),) = asyncio.run(StoreHandle(store, 1.0).pull(None))
    assert store.num_plans == 3
    assert data.tolist() == [0, 1, 2]
    with pytest.raises(WeightsCorrupt, match="were gone"):
        asyncio.run(StoreHandle(Forgetful(10**6), 1.0).pull(None))


def test_a_publish_that_failed_leaves_no_base(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, replica = Learner(store), Replica()
    learner.publish()
    with monkeypatch.context() as patch:
        patch.setattr(store.chain, "commit", _raise)
        with pytest.raises(InfraError, match="gone"):
            learner.publish()
    assert learner.publish().kind == "full"
    pull(store, replica)
    assert_holds(replica, learner)


def _raise(*_: Any) -> None:
    raise InfraError("gone")
