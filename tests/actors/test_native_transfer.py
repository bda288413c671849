"""Native transports between learner and generators, without Ray: calls go to a generator's loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.actors.cluster.placement import check_transfer
from raygrpo.actors.generator import GeneratorActor
from raygrpo.actors.learner import publish_timeout_s
from raygrpo.actors.native_transfer import ActorReceiver, ReceivingGenerator, broken, receivers
from raygrpo.actors.pool.workers import Worker
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, InfraError, ProbeFailed, WeightsLost
from raygrpo.types import Version
from raygrpo.weights.native import NativeTransfer
from raygrpo.weights.types import Probe
from tests import builders
from tests.weights.test_native import FakeReceiver, FakeSender, buckets, held, weights

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
    found = receivers(configured(), workers)
    assert found == {"generator-0/10": workers[0].actor}
    assert receivers(builders.config(), workers) == {}
    assert broken(workers, {"generator-0/10": "why"}) == [(workers[0], "why")]
    workers[0].pid = 99  # another one has taken its place
    assert broken(workers, {"generator-0/10": "why"}) == []


class FakeEngine:
    """Holds no version from ``begin`` to `hold`, as `VllmEngine`."""

    num_unfinished = 0
    can_step = False

    def __init__(self) -> None:
        self.end = FakeReceiver()
        self.version: Version | None = None

    def transfer(self, call: str, argument: Any) -> Future[None]:
        if call == "begin":
            self.version = None
            return self.end.begin()
        future: Future[None] = getattr(self.end, call)(argument)
        return future

    def hold(self, version: Version) -> None:
        self.version = version


class Handle:
    """A generator's process: its loop, and calls as Ray makes them."""

    def __init__(self, store_has: list[Version | None]) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        self.store: Any = SimpleNamespace(newest=lambda: store_has[-1])
        self.actor = ReceivingGenerator(configured(), self.store, threads=1)
        self.engine = FakeEngine()
        self.actor._engine = self.actor._traced = self.engine  # type: ignore[assignment]
        self.actor._loop = self.loop
        threading.Thread(target=self.actor._serve, daemon=True).start()
        self.transfer = SimpleNamespace(remote=self._transfer)

    def _transfer(self, call: str, argument: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(self.actor.transfer(call, argument), self.loop)
        return SimpleNamespace(future=lambda: future)

    def load(self) -> Any:
        return asyncio.run_coroutine_threadsafe(self.actor.load(), self.loop).result(TIMEOUT_S)


@pytest.fixture
def store() -> list[Version | None]:
    return [None]


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Version]]:
    """The versions that a probe was checked of; one of step 9 fails it."""
    checked: list[Version] = []

    def check(self: Any, engine: Any, probe: Probe, version: Version) -> None:
        assert engine.version == version
        checked.append(version)
        if version.step == 9:
            raise ProbeFailed(version, 1.0, 0.1)

    monkeypatch.setattr("raygrpo.engines.probe.ProbeCheck.check", check)
    yield checked


def sync(transfer: NativeTransfer, version: Version, handles: Mapping[str, Handle]) -> Any:
    probe = Probe(token_ids=(1, 2), logprobs=(0.0, -float(version.step)))
    ends = {name: ActorReceiver(handle, 1, probe) for name, handle in handles.items()}
    return transfer.sync(version, buckets(version.step), ends)


def test_a_version_from_the_learner_is_proven_once_and_not_pulled(
    store: list[Version | None], proven: list[Version]
) -> None:
    handles = {name: Handle(store) for name in "ab"}
    sender = FakeSender()
    transfer = NativeTransfer(sender, TIMEOUT_S)
    for step in (1, 2):
        version = Version(1, step)
        assert sync(transfer, version, handles).loaded == ("a", "b")
        store.append(version)
        for handle in handles.values():
            assert held(handle.engine.end) == weights(step)
            assert handle.engine.version == version
            for _ in range(2):  # Ray may be told twice to load
                report = handle.load()
                assert (report.version, report.kind, report.num_bytes) == (version, "none", 0)
    assert proven == [Version(1, step) for step in (1, 1, 2, 2)]
    assert len(sender.groups) == 1  # same actors, same group, though the probes are others
    transfer.close()


def test_a_newer_version_in_the_store_is_pulled(
    store: list[Version | None], proven: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = SimpleNamespace(version=Version(1, 5))

    async def load(self: Any) -> Any:
        return pulled

    handle = Handle(store)
    transfer = NativeTransfer(FakeSender(), TIMEOUT_S)
    sync(transfer, Version(1, 1), {"a": handle})
    store.append(Version(1, 5))
    monkeypatch.setattr(GeneratorActor, "_load", load)
    assert handle.load() is pulled
    assert handle.actor._sent is None
    transfer.close()


def test_a_version_that_fails_its_probe_ends_the_load(
    store: list[Version | None], proven: list[Version]
) -> None:
    handle = Handle(store)
    transfer = NativeTransfer(FakeSender(), TIMEOUT_S)
    sync(transfer, Version(1, 9), {"a": handle})
    with pytest.raises(ProbeFailed):
        handle.load()
    transfer.close()


def test_a_transfer_that_is_not_finished_leaves_nothing_that_serves(
    store: list[Version | None],
) -> None:
    good, bad = Handle(store), Handle(store)
    bad.engine.end = FakeReceiver({"receive": "dies"})
    result = sync(NativeTransfer(FakeSender(), 1.0), Version(1, 1), {"good": good, "bad": bad})
    assert set(result.broken) == {"good", "bad"}
    assert "the actor died" in result.broken["bad"]
    for handle in (good, bad):
        assert handle.engine.version is None
        assert handle.actor._loading.locked()  # no load, until it is replaced


def test_nothing_is_answered_before_weights_that_are_loaded_again_are_proven(
    store: list[Version | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that slept its weights away writes a group as soon as it has them again."""
    handle = Handle(store)
    version = Version(1, 2)
    answers: list[Any] = []
    probe = Probe(token_ids=(1, 2), logprobs=(0.0, -1.0))
    manifest = SimpleNamespace(version=version, kind="full", sent_bytes=0, num_bytes=8, probe=probe)

    async def nothing_newer(*_: Any) -> list[Any]:
        return []

    def write_and_fail(self: Any, engine: Any, probe: Probe, version: Version) -> None:
        handle.loop.call_soon_threadsafe(handle.actor._finish, ("train", 0, 0), ("written",))
        raise ProbeFailed(version, 1.0, 0.1)

    def load_weights(manifest: Any, buckets: Any) -> None:
        handle.engine.version = manifest.version

    async def wait_for_group() -> None:
        future = handle.actor._waiting["train", 0, 0] = handle.loop.create_future()
        future.add_done_callback(lambda done: answers.append(done.result()))

    handle.store.pull = nothing_newer
    monkeypatch.setattr("raygrpo.engines.probe.ProbeCheck.check", write_and_fail)
    engine: Any = handle.engine
    engine.wake, engine.load_weights = lambda: None, load_weights
    handle.actor._replica = SimpleNamespace(  # type: ignore[assignment]
        version=version, current=SimpleNamespace(manifest=manifest, buckets=())
    )
    handle.actor._asleep = True
    asyncio.run_coroutine_threadsafe(wait_for_group(), handle.loop).result(TIMEOUT_S)
    with pytest.raises(ProbeFailed):
        handle.load()
    assert answers == []


def test_an_engine_sleeps_on_where_the_weights_are_lost(
    store: list[Version | None],
) -> None:
    """The learner publishes again, and may need the room on a device that they share."""
    handle, woken = Handle(store), []

    async def lost(*_: Any) -> list[Any]:
        raise WeightsLost("the store was restarted")

    handle.store.pull = lost
    handle.engine.wake = lambda: woken.append(True)  # type: ignore[attr-defined]
    handle.actor._asleep = True
    with pytest.raises(WeightsLost):
        handle.load()
    assert not woken
    assert handle.actor._asleep


def test_an_engine_that_cannot_sleep_is_an_infrastructure_error(
    store: list[Version | None],
) -> None:
    handle = Handle(store)

    def sleep() -> None:
        assert handle.engine.version, "memory usage increased after sleeping"

    handle.engine.sleep = sleep  # type: ignore[attr-defined]
    sleeping = asyncio.run_coroutine_threadsafe(handle.actor.sleep(), handle.loop)
    with pytest.raises(InfraError, match="did not free its device: AssertionError: memory usage"):
        sleeping.result(TIMEOUT_S)
    assert not handle.actor._asleep
