"""A native transport's two ends, without Ray: calls go straight to a generator's event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raygrpo.actors import generator
from raygrpo.actors.cluster.placement import check_transfer
from raygrpo.actors.generator import GeneratorActor
from raygrpo.actors.native_transfer import receiver_of
from raygrpo.actors.pool.workers import Worker
from raygrpo.actors.transport import publish_timeout_s
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, InfraError, ProbeFailed, WeightsLost
from raygrpo.types import ByteArray, FloatArray, Group, GroupRequest, Version
from raygrpo.weights.buckets import make_version
from raygrpo.weights.native import Message, NativeTransfer, Receive
from raygrpo.weights.replica import WeightLink
from raygrpo.weights.types import Probe, WeightsManifest
from tests import builders
from tests.weights.test_native import FakeReceiver, FakeSender, buckets, held, manifest, weights

TIMEOUT_S = 30.0


def configured(kind: str = "nccl", **sections: Any) -> RunConfig:
    gpus = {"learner": 1, "generator": 1} if kind == "nccl" else {"learner": 0.5, "generator": 0.25}
    generators = {"engine": "vllm", "count": 2}
    given = {"ray": {"gpus": gpus}, "weights": {"transport": kind}, **sections}
    return builders.config(generators=generators | given.pop("generators", {}), **given)


def test_what_can_work_is_taken() -> None:
    check_transfer(builders.config())
    check_transfer(configured("nccl"))
    check_transfer(configured("ipc"))


@pytest.mark.parametrize(
    ("kind", "sections", "problem"),
    [
        ("nccl", {"generators": {"engine": "transformers"}}, "generators.engine: vllm"),
        ("nccl", {"generators": {"engine": "auto"}}, "generators.engine: vllm"),
        ("nccl", {"ray": {}}, "needs CUDA devices: set ray.gpus.learner and ray.gpus.generator"),
        ("ipc", {"ray": {"gpus": {"learner": 1}}}, "needs CUDA devices"),
        ("nccl", {"ray": {"gpus": {"learner": 0.5, "generator": 0.5}}}, "needs whole GPUs"),
        ("ipc", {"ray": {"gpus": {"learner": 1, "generator": 1}}}, "one GPU"),
        ("ipc", {"generators": {"count": 3}}, "one GPU"),
        ("nccl", {"learner": {"lora": {"rank": 4}}}, "learner.lora"),
        (
            "ipc",
            {"generators": {"placement": "colocate", "count": 1}, "train": {"max_staleness": 0}},
            "generators.placement: disaggregate",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    kind: str, sections: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"weights.transport is {kind}.*{problem}"):
        check_transfer(configured(kind, **sections))


def test_a_publication_has_time_to_say_which_generator_missed_the_transfers_deadline() -> None:
    assert publish_timeout_s(builders.config()) == builders.config().ray.timeouts_s.sync
    sent = configured("nccl")
    assert publish_timeout_s(sent) > sent.ray.timeouts_s.sync


def test_members_are_the_generators_that_serve_and_names_outlast_no_replacement() -> None:
    workers = [Worker("generator", f"generator-{i}", object(), pid=10 + i) for i in range(6)]
    workers[1].starting = workers[2].loading = object()
    workers[3].joining, workers[4].asleep, workers[5].leaving = True, True, "its node is drained"
    assert [worker.process for worker in workers if worker.can_receive] == ["generator-0/10"]


class FakeEngine:
    """Holds what the learner or the store gave it; its logprobs say which version that is.

    The logprobs of step 9 are another step's.
    """

    def __init__(self) -> None:
        self.receiver = FakeReceiver()
        self.version: Version | None = None
        self.held: list[Version | None] = []
        self.proven: list[Version] = []
        self.num_wakes = 0
        self.can_free = True
        self.requests: list[GroupRequest] = []
        self.written = threading.Event()
        self._staged: WeightsManifest | None = None

    def hold(self, version: Version | None) -> None:
        self.version = version
        self.held.append(version)

    def transfer(self, message: Message) -> Future[None]:
        return self.receiver(message)

    @property
    def can_step(self) -> bool:
        return bool(self.version and self.requests)

    def submit(self, request: GroupRequest) -> None:
        self.requests.append(request)

    def step(self) -> list[Group]:
        requests, self.requests = self.requests, []
        self.written.set()
        return [builders.group(order, [builders.completion([1])] * 2) for order in requests]

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        assert self.version is not None
        self.proven.append(self.version)
        if self.requests or self.written.is_set():
            assert self.written.wait(TIMEOUT_S), "the group is written beside the proof"
        step = 0 if self.version.step == 9 else self.version.step
        return np.array([0.0, -step], np.float32)

    def stage_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        self._staged = manifest

    def commit_weights(self) -> None:
        assert self._staged is not None
        self.version = self._staged.version

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        self.version = manifest.version

    def sleep(self) -> None:
        assert self.can_free, "memory usage increased after sleeping"
        self.version = None

    def wake(self) -> None:
        self.num_wakes += 1


class Store:
    """Has one whole version, or is empty."""

    def __init__(self) -> None:
        self.version: Version | None = None
        self.empty = False

    def newest(self) -> Version | None:
        return self.version

    async def pull(self, have: Version | None) -> list[WeightLink]:
        if self.empty:
            raise WeightsLost("the store was restarted")
        if self.version is None or have == self.version:
            return []
        manifest, buckets = make_version(self.version, [("w", torch.ones(4))])
        return [(replace(manifest, probe=probe_of(self.version)), buckets)]


def probe_of(version: Version) -> Probe:
    return Probe(token_ids=(1, 2), logprobs=(0.0, -float(version.step)))


class Handle:
    """A generator's process: its event loop, and calls as Ray makes them."""

    def __init__(self, store: Store) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = FakeEngine()
        self.transfer = SimpleNamespace(remote=self._transfer)
        self._store: Any = store
        self.actor: GeneratorActor = self.call(self._start()).result(TIMEOUT_S)

    async def _start(self) -> GeneratorActor:
        config = configured(train={"max_staleness": 1})
        actor = GeneratorActor(config, self._store, 1, make_engine=self._make_engine)
        await actor.start(None)
        return actor

    def _make_engine(self, *_: Any, **__: Any) -> Any:
        return self.engine

    def call(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _transfer(self, message: Any) -> Any:
        future = self.call(self.actor.transfer(message))
        return SimpleNamespace(future=lambda: future)

    def load(self) -> Any:
        return self.call(self.actor.load()).result(TIMEOUT_S)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(generator, "on_sigterm", lambda _: None)
    return Store()


def sync(transfer: NativeTransfer, step: int, handles: Mapping[str, Handle]) -> dict[str, str]:
    ends = {name: receiver_of(handle) for name, handle in handles.items()}
    return transfer.sync(manifest(step, probe_of(Version(1, step))), buckets(step), ends)


@pytest.fixture
def transfer() -> Iterator[NativeTransfer]:
    transfer = NativeTransfer(FakeSender(), TIMEOUT_S)
    yield transfer
    transfer.close()


def test_a_version_from_the_learner_is_proven_once_and_not_pulled(store: Store) -> None:
    handles = {name: Handle(store) for name in "ab"}
    sender = FakeSender()
    transfer = NativeTransfer(sender, TIMEOUT_S)
    for step in (1, 2):
        version = Version(1, step)
        assert not sync(transfer, step, handles)
        store.version = version
        for handle in handles.values():
            assert held(handle.engine.receiver) == weights(step)
            assert handle.engine.version == version
            for _ in range(2):  # Ray may be told twice to load
                report = handle.load()
                assert (report.version, report.kind, report.num_bytes) == (version, "none", 0)
    assert [h.engine.proven for h in handles.values()] == [[Version(1, 1), Version(1, 2)]] * 2
    held_by = [handle.engine.held for handle in handles.values()]
    assert held_by == [[None, Version(1, 1), None, Version(1, 2)]] * 2, "none during a transfer"
    assert len(sender.groups) == 1  # same actors, same group, though the probes are others
    transfer.close()


def test_a_newer_version_in_the_store_is_pulled(store: Store, transfer: NativeTransfer) -> None:
    handle = Handle(store)
    sync(transfer, 1, {"a": handle})
    store.version = Version(1, 5)
    report = handle.load()
    assert (report.version, report.kind) == (Version(1, 5), "full")
    assert handle.engine.proven == [Version(1, 1), Version(1, 5)]


def test_a_version_that_fails_its_probe_ends_the_load(
    store: Store, transfer: NativeTransfer
) -> None:
    """A group that was written meanwhile is not answered."""
    handle = Handle(store)
    answer = handle.call(handle.actor.generate(builders.request(0)))
    sync(transfer, 9, {"a": handle})
    assert handle.engine.written.wait(TIMEOUT_S)
    with pytest.raises(ProbeFailed):
        handle.load()
    assert not answer.done()


def test_a_transfer_that_is_not_finished_leaves_nothing_that_serves(store: Store) -> None:
    good, bad = Handle(store), Handle(store)
    bad.engine.receiver = FakeReceiver({Receive: "dies"})
    broken = sync(NativeTransfer(FakeSender(), 1.0), 1, {"good": good, "bad": bad})
    assert set(broken) == {"good", "bad"}
    assert "the actor died" in broken["bad"]
    store.version = Version(1, 1)
    for handle in (good, bad):
        assert handle.engine.version is None
        with pytest.raises(TimeoutError):  # no load, until the generator is replaced
            handle.call(handle.actor.load()).result(0.2)


def test_nothing_is_answered_before_weights_that_are_loaded_again_are_proven(store: Store) -> None:
    """An engine that slept its weights away writes a group as soon as it has them again."""
    handle = Handle(store)
    store.version = Version(1, 2)
    assert handle.load().kind == "full"
    handle.call(handle.actor.sleep()).result(TIMEOUT_S)
    answer = handle.call(handle.actor.generate(builders.request(0)))
    handle.engine.load_weights = lambda manifest, _: handle.engine.hold(Version(1, 9))  # type: ignore[method-assign]
    with pytest.raises(ProbeFailed):
        handle.load()
    assert handle.engine.written.is_set()
    assert not answer.done()


def test_an_engine_sleeps_on_where_the_weights_are_lost(store: Store) -> None:
    """The learner publishes again, and may need the room on a device that they share."""
    handle = Handle(store)
    store.version = Version(1, 2)
    handle.load()
    handle.call(handle.actor.sleep()).result(TIMEOUT_S)
    store.empty = True
    with pytest.raises(WeightsLost):
        handle.load()
    assert handle.engine.num_wakes == 0
    store.empty = False
    assert handle.load().kind == "none"
    assert handle.engine.num_wakes == 1


def test_an_engine_that_cannot_sleep_is_an_infrastructure_error(store: Store) -> None:
    handle = Handle(store)
    store.version = Version(1, 2)
    handle.load()
    handle.engine.can_free = False
    with pytest.raises(InfraError, match="device failed: AssertionError: memory usage"):
        handle.call(handle.actor.sleep()).result(TIMEOUT_S)
    handle.load()
    assert handle.engine.num_wakes == 0, "it is awake"
