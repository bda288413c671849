"""Weight syncs with real Ray actors that die, stop or go wrong at chosen moments.

One pool with one generator for the whole module: each test publishes newer versions, does its
damage, and leaves a generator that serves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raygrpo.actors.cluster.connect import connect, disconnect
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.pool.workers import PoolEvents, Worker
from raygrpo.actors.weight_store import StoreHandle, WeightStoreActor, start_store
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.engines.base import Engine
from raygrpo.engines.probe import FIRST_LIMIT
from raygrpo.engines.select import make_engine
from raygrpo.errors import InfraError
from raygrpo.models import load_model
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import ByteArray, FloatArray, Version
from raygrpo.weights.buckets import make_buckets, make_version, unpack
from raygrpo.weights.probe import probe_tokens
from raygrpo.weights.publisher import Publisher, Store
from raygrpo.weights.shared import SharedAddress
from raygrpo.weights.types import Probe, WeightsManifest
from tests import builders, runs

pytestmark = runs.RAY_IN_PROCESS

# Of a load and of a group: long enough for a tiny model on a machine that is busy otherwise.
DEADLINE_S = 10.0


class FaultyEngine:
    """A generator's engine that does damage while a file of that name is in ``model.path``.

    ``hold_stage`` and ``hold_step`` stop it there, and say so with a file ``at_stage``,
    ``at_step``; ``break_stage`` and ``break_step`` fail there, once; ``perturb`` stages one norm
    times the factor in the file, once. ``forget`` has it sleep as vLLM does at level 2: the weights
    are lost.
    """

    def __init__(self, engine: Engine, place: Path) -> None:
        self._engine, self._place = engine, place
        self._forgot = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def version(self) -> Version | None:
        return None if self._forgot else self._engine.version

    @property
    def can_step(self) -> bool:
        return not self._forgot and self._engine.can_step

    def _pass(self, what: str) -> None:
        while (self._place / f"hold_{what}").exists():
            (self._place / f"at_{what}").touch()
            time.sleep(0.01)
        if (self._place / f"break_{what}").exists():
            (self._place / f"break_{what}").unlink()
            raise OSError("no memory") if what == "stage" else InfraError("the core died")

    def step(self) -> Any:
        self._pass("step")
        return self._engine.step()

    def stage_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        self._pass("stage")
        if (self._place / "perturb").exists():
            factor = float((self._place / "perturb").read_text())
            (self._place / "perturb").unlink()
            manifest, buckets = with_other_norm(manifest, buckets, factor)
        self._engine.stage_weights(manifest, buckets)

    def commit_weights(self) -> None:
        self._engine.commit_weights()
        self._forgot = False

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        self._engine.load_weights(manifest, buckets)
        self._forgot = False

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        assert not self._forgot
        return self._engine.score(token_ids, temperature)

    def sleep(self) -> None:
        self._engine.sleep()
        if (self._place / "forget").exists():
            (self._place / "forget").unlink()
            self._forgot = True


def with_other_norm(
    manifest: WeightsManifest, buckets: Iterable[ByteArray], factor: float
) -> tuple[WeightsManifest, list[ByteArray]]:
    """The version with one norm times ``factor``, and checksums to match."""
    pairs = zip(manifest.buckets, buckets, strict=True)
    tensors = {name: tensor for spec, data in pairs for name, tensor in unpack(spec, data)}
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * factor
    other, arrays = make_version(manifest.version, tensors.items())
    return replace(other, probe=manifest.probe), arrays


def make_faulty_engine(config: RunConfig, *, threads: int, version: Version | None) -> Any:
    engine = make_engine(config, threads=threads, version=version)
    return FaultyEngine(engine, Path(config.model.path))


class StoreWithPid(WeightStoreActor):
    """The store, which says which process it is."""

    def pid(self) -> int:
        return os.getpid()


@dataclass
class Cluster:
    config: RunConfig
    store: StoreHandle
    pool: RolloutPool
    place: Path
    step: int = -1
    events: list[tuple[str, Any]] = field(default_factory=list)
    group_id: int = -1

    def __post_init__(self) -> None:
        self.model = load_model(self.config.model, seed=0, dtype=torch.float32)
        self.publisher = self.new_publisher()

    def new_publisher(self, store: Store | None = None, **options: Any) -> Publisher:
        return Publisher(store or self.store, local=True, **options)

    def kill_store(self) -> None:
        os.kill(ray.get(self.store.actor.pid.remote(), timeout=60), signal.SIGKILL)

    def publish(self) -> Version:
        """A newer version, a little different, as a learner would publish it."""
        self.step += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)
        return self.publish_again()

    def sync(self) -> Version:
        """Publishes a newer version and has the pool load it."""
        version = self.publish()
        self.pool.load()
        return version

    def publish_again(self) -> Version:
        """The same version, as the trainer has it published when it was lost."""
        version = Version(1, self.step)
        self.publisher.publish(version, self.model.named_parameters(), probe=self.probe())
        return version

    def probe(self) -> Probe:
        tokens = probe_tokens(self.model.config.vocab_size, 0)
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        return Probe(token_ids=tokens, logprobs=(0.0, *chosen.tolist()))

    @property
    def generator(self) -> Worker:
        return self.pool.generators[0]

    def wait_until(self, condition: Callable[[PoolEvents], bool]) -> PoolEvents:
        """Waits of the pool until one brings what is asked for."""
        deadline = time.monotonic() + 120
        while True:
            done = self.pool.wait([], 0.2, TrainerState(global_step=0, max_steps=1))
            self.events += done.events
            if condition(done):
                return done
            assert time.monotonic() < deadline, f"it never came; events: {self.events}"

    def submit(self) -> None:
        self.group_id += 1
        self.pool.submit(
            builders.request(self.group_id, step=self.step, tokens=(5, 6, 7), max_tokens=4)
        )

    def wait_for_group(self) -> None:
        """The group that was submitted comes, written by the current version alone."""
        done = self.wait_until(lambda d: bool(d.groups))
        (summary,) = [group.summary for group in done.groups]
        assert summary.group_id == self.group_id
        assert set(summary.oldest) == set(summary.newest) == {Version(1, self.step)}

    def generate(self) -> None:
        self.submit()
        self.wait_for_group()

    def wait_for_load(self, version: Version) -> Any:
        done = self.wait_until(lambda d: any(load.version == version for load in d.loads))
        return next(load for load in done.loads if load.version == version)

    def stop_in(self, what: str, begin: Callable[[], object]) -> None:
        """Begins work in which the engine stops, at ``hold_`` of this name."""
        self.hold(what)
        begin()
        self.wait_held(what)

    def hold(self, what: str) -> None:
        (self.place / f"at_{what}").unlink(missing_ok=True)
        (self.place / f"hold_{what}").touch()

    def wait_held(self, what: str) -> None:
        self.wait_until(lambda _: (self.place / f"at_{what}").exists())

    def release(self, what: str) -> None:
        (self.place / f"hold_{what}").unlink()

    def take_events(self) -> list[str]:
        events, self.events = self.events, []
        return [kind for kind, _ in events]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    directory = tmp_path_factory.mktemp("sync")
    timeouts = {"start": 120.0, "generate": DEADLINE_S, "sync": DEADLINE_S}
    path = runs.write_run(
        directory,
        "sync",
        deterministic=False,
        train={"max_staleness": 1},
        ray={"timeouts_s": timeouts},
    )
    config = load_config(path)
    connection = connect(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raygrpo.actors.weight_store.WeightStoreActor", StoreWithPid)
        store = start_store()
        pool = RolloutPool(config, store, {}, Site(local=True), make_faulty_engine)
        pool.start(normal_gap=None)
        yield Cluster(config=config, store=store, pool=pool, place=directory / "model")
        pool.close()
        store.close()
        disconnect(connection)


def test_syncs_load_while_groups_are_generated(cluster: Cluster) -> None:
    for _ in range(3):
        version = cluster.sync()
        cluster.submit()
        report = cluster.wait_for_load(version)
        # fp32 of two orders of summation; the tolerance is 1e-3.
        assert report.probe_gap is not None
        assert report.probe_gap < 1e-4
        assert 0 < report.stall_s < report.load_s
        cluster.wait_for_group()
    assert cluster.take_events() == []


@pytest.mark.parametrize("newer", [False, True])
def test_weights_that_were_slept_away_come_back(cluster: Cluster, newer: bool) -> None:
    """With a newer version in the store, and where the learner published none meanwhile."""
    version = cluster.sync()
    cluster.wait_for_load(version)
    (cluster.place / "forget").touch()
    cluster.wait_until(lambda _: cluster.pool.sleep())
    assert not (cluster.place / "forget").exists()
    if newer:
        version = cluster.publish()
    cluster.pool.load()
    report = cluster.wait_for_load(version)
    assert (report.kind == "none") != newer
    assert report.probe_gap is not None
    assert report.probe_gap < 1e-4
    cluster.generate()
    assert cluster.take_events() == []


def test_weights_that_were_slept_away_come_back_after_a_lost_store(cluster: Cluster) -> None:
    """The load that wakes the engine finds nothing; the next one finds what is held already."""
    version = cluster.sync()
    cluster.wait_for_load(version)
    (cluster.place / "forget").touch()
    cluster.wait_until(lambda _: cluster.pool.sleep())
    cluster.kill_store()
    cluster.pool.load()
    cluster.wait_until(lambda d: d.weights_lost)
    cluster.publish_again()
    cluster.pool.load()
    assert cluster.wait_for_load(version).kind == "none"
    cluster.generate()
    assert cluster.take_events() == ["weights_lost"]


def test_a_generator_killed_during_a_sync(cluster: Cluster) -> None:
    """And its successor, which is given groups once it holds the newest version, not before."""
    cluster.stop_in("stage", cluster.sync)
    os.kill(cluster.generator.pid, signal.SIGKILL)
    cluster.wait_until(lambda d: any(kind == "worker_replaced" for kind, _ in d.events))
    cluster.stop_in(
        "stage", cluster.submit
    )  # by the successor, of the version that was newest as it began
    version = cluster.sync()
    assert cluster.generator.joining
    assert not cluster.generator.groups
    cluster.release("stage")
    cluster.wait_for_load(Version(1, version.step - 1))
    assert not cluster.generator.groups
    cluster.wait_for_load(version)
    assert not cluster.generator.joining
    cluster.wait_for_group()
    assert cluster.take_events() == ["worker_replaced"]


@pytest.mark.slow
def test_a_generator_killed_between_sync_and_decode(cluster: Cluster) -> None:
    version = cluster.sync()
    cluster.wait_for_load(version)
    os.kill(cluster.generator.pid, signal.SIGKILL)
    cluster.generate()
    assert cluster.take_events() == ["worker_replaced"]


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_generator_killed_or_stopped_during_a_decode(
    cluster: Cluster, how: signal.Signals
) -> None:
    cluster.stop_in("step", cluster.submit)
    os.kill(cluster.generator.pid, how)
    cluster.release("step")
    cluster.wait_for_group()
    assert cluster.take_events() == ["worker_replaced"]


def test_an_engine_whose_probe_is_off_serves_nothing(cluster: Cluster) -> None:
    """The bytes are right, their checksums agreed; one norm is 1 % off when it is used."""
    (cluster.place / "perturb").write_text("1.01")
    version = cluster.publish()
    cluster.submit()
    cluster.pool.load()
    done = cluster.wait_until(lambda d: bool(d.events))
    kinds = [kind for kind, _ in done.events]
    assert kinds == ["probe_failed", "worker_replaced"]
    figures = done.events[0][1]
    assert figures["version"] == version
    assert figures["tolerance"] == 1e-3
    assert figures["gap"] > 1e-3
    cluster.wait_for_group()  # the successor, on the same version
    cluster.take_events()


def test_a_late_joiner_is_held_to_the_gap_of_the_runs_first_version(cluster: Cluster) -> None:
    """Though it is the first version that its own process checks."""
    cluster.publish()
    os.kill(cluster.generator.pid, signal.SIGKILL)
    (cluster.place / "perturb").write_text("1.003")
    cluster.submit()
    done = cluster.wait_until(lambda d: any(kind == "probe_failed" for kind, _ in d.events))
    (figures,) = [fields for kind, fields in done.events if kind == "probe_failed"]
    assert figures["tolerance"] == 1e-3
    assert 1e-3 < figures["gap"] < FIRST_LIMIT * 1e-3, "a run's first version would be let through"
    cluster.wait_for_group()
    cluster.take_events()


@pytest.mark.parametrize("what", ["stage", pytest.param("step", marks=pytest.mark.slow)])
def test_an_engine_that_fails_is_replaced(cluster: Cluster, what: str) -> None:
    """In a load by something untyped, in a step as when vLLM's core dies: not the group's fault."""
    cluster.publish()
    (cluster.place / f"break_{what}").touch()
    cluster.submit()
    cluster.pool.load()
    done = cluster.wait_until(lambda d: any(kind == "worker_replaced" for kind, _ in d.events))
    (error,) = [fields["error"] for kind, fields in done.events if kind == "worker_replaced"]
    assert ("OSError: no memory" if what == "stage" else "the core died") in error
    cluster.wait_for_group()
    assert cluster.take_events() == ["worker_replaced"]


@pytest.mark.slow
def test_a_generator_stopped_in_the_midst_of_a_load(cluster: Cluster) -> None:
    cluster.stop_in("stage", cluster.sync)
    os.kill(cluster.generator.pid, signal.SIGSTOP)
    cluster.release("stage")
    cluster.generate()
    assert "worker_replaced" in cluster.take_events()


def test_a_load_that_is_late_gives_back_the_groups_beside_it(cluster: Cluster) -> None:
    cluster.stop_in("stage", cluster.sync)
    cluster.submit()  # waits in the engine for the version that does not come
    cluster.wait_until(lambda d: any(kind == "worker_leaving" for kind, _ in d.events))
    cluster.release("stage")
    cluster.wait_for_group()
    assert cluster.take_events() == ["worker_leaving", "worker_replaced"]


def test_a_stopped_generator_is_replaced_at_its_deadline(cluster: Cluster) -> None:
    """Publishes go on meanwhile: they do not put the deadline off."""
    stopped = cluster.generator.pid
    os.kill(stopped, signal.SIGSTOP)
    started = time.monotonic()
    while not cluster.take_events():
        cluster.sync()
        cluster.wait_until(lambda _: True)
        assert time.monotonic() - started < 2 * DEADLINE_S
    assert time.monotonic() - started > DEADLINE_S - 1
    cluster.generate()
    # Ray asks a worker to exit, and kills one that does not answer a few seconds later.
    cluster.wait_until(lambda _: not _runs(stopped))


def test_a_store_that_dies_is_filled_again(cluster: Cluster) -> None:
    generator = cluster.generator.pid
    cluster.kill_store()
    cluster.pool.load()
    done = cluster.wait_until(lambda d: d.weights_lost)
    assert [kind for kind, _ in done.events] == ["weights_lost"]
    # A delta on what the store has lost is refused; the publisher then sends the whole version.
    version = cluster.sync()
    assert cluster.wait_for_load(version).kind == "full"
    cluster.generate()
    assert cluster.generator.pid == generator, "it was not the generator's fault"
    cluster.take_events()


@dataclass
class SpoiledStore:
    """The cluster's store, and what a publish does to it on the way.

    It dies before bucket ``dies_at`` is sent; ``corrupt`` changes a byte of each whole bucket.
    """

    cluster: Cluster
    dies_at: int = -1
    corrupt: bool = False

    def newest(self) -> Version | None:
        return self.cluster.store.newest()

    def commit(self, *manifests: WeightsManifest) -> None:
        self.cluster.store.commit(*manifests)

    def put(
        self, version: Version, index: int, data: ByteArray, *, encoded: bool
    ) -> Callable[[], None]:
        if self.corrupt:
            data = data.copy()
            data[data.size // 2] ^= 1
        return self.cluster.store.put(version, index, data, encoded=encoded)

    def adopt(self, version: Version, index: int, address: SharedAddress) -> Callable[[], bool]:
        if self.corrupt:
            return lambda: False
        if index == self.dies_at:
            self.dies_at = -1
            self.cluster.kill_store()
        answer = self.cluster.store.adopt(version, index, address)()
        return lambda: answer


def test_a_store_that_dies_during_a_publish_gets_it_all(cluster: Cluster) -> None:
    """Killed before the last bucket is sent: the restarted one has that bucket alone."""
    size = 2**14
    num_buckets = len(list(make_buckets(cluster.model.named_parameters(), size)))
    assert num_buckets > 1
    store = SpoiledStore(cluster, dies_at=num_buckets - 1)
    cluster.publisher = cluster.new_publisher(store, bucket_bytes=size)
    version = cluster.sync()
    assert cluster.wait_for_load(version).kind == "full"
    cluster.generate()
    assert cluster.take_events() == []
    cluster.publisher = cluster.new_publisher()


def test_a_corrupt_version_is_pushed_again(cluster: Cluster) -> None:
    store = SpoiledStore(cluster, corrupt=True)
    cluster.publisher = cluster.new_publisher(store)
    cluster.publish()
    store.corrupt = False
    cluster.pool.load()
    done = cluster.wait_until(lambda d: bool(d.events))
    assert [kind for kind, _ in done.events] == ["weights_corrupt", "worker_replaced"]
    assert all("corrupt" in fields["error"] for _, fields in done.events)
    # Nothing newer comes in an on-policy run: its groups wait for this very version.
    assert done.weights_lost
    cluster.publish_again()
    cluster.pool.load()
    cluster.generate()
    assert set(cluster.take_events()) <= {"weights_corrupt", "weights_lost", "worker_replaced"}


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
