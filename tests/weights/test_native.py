"""The protocol around native transports, with a collective of threads in the place of NCCL."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.types import Version
from raygrpo.weights.native import Named, NativeTransfer

TIMEOUT_S = 0.3


class Group:
    """A broadcast group: as with NCCL, all ranks must take part in all that is done, or all hang.

    A rank that never comes leaves the others waiting until the group is given up.
    """

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.sent: list[Tensor] = []

    def enter(self) -> None:
        self.barrier.wait()

    def broadcast(self, tensors: list[Tensor] | None) -> list[Tensor]:
        if tensors is not None:
            self.sent = tensors
        self.barrier.wait()
        taken = [tensor.clone() for tensor in self.sent]
        self.barrier.wait()
        return taken


class FakeSender:
    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.offered: list[Named] = []

    def open(self, world_size: int) -> dict[str, Any]:
        self.groups.append(Group(world_size))
        return {"group": self.groups[-1], "world_size": world_size}

    def connect(self) -> None:
        self.groups[-1].enter()

    def offer(self, bucket: list[Named]) -> dict[str, Any]:
        self.offered = bucket
        return {"names": [name for name, _ in bucket]}

    def transmit(self) -> None:
        self.groups[-1].broadcast([tensor for _, tensor in self.offered])

    def close(self) -> None:
        if self.groups:
            self.groups[-1].barrier.abort()


class FakeReceiver:
    """An engine on a thread of its own; ``fault`` maps a call's name to what happens instead."""

    num_workers = 1

    def __init__(self, fault: Mapping[str, str] = {}) -> None:
        self.fault = dict(fault)
        self.held: dict[str, Tensor] = {}
        self.version: Version | None = None
        self.whole = True
        self.ranks: list[int] = []
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            call, future = self._calls.get()
            try:
                call()
                future.set_result(None)
            except Exception as error:
                future.set_exception(error)

    def _do(self, name: str, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        fault = self.fault.pop(name, "")
        if fault == "dies":
            future.set_exception(RuntimeError("the actor died"))
        elif fault != "hangs":
            self._calls.put((call, future))
        return future

    def join(self, init_info: Mapping[str, Any]) -> Future[None]:
        def call() -> None:
            self.group = init_info["group"]
            self.ranks.append(init_info["rank_offset"])
            self.group.enter()

        return self._do("join", call)

    def begin(self) -> Future[None]:
        return self._do("begin", lambda: setattr(self, "whole", False))

    def receive(self, update_info: Mapping[str, Any]) -> Future[None]:
        def call() -> None:
            names = update_info["names"]
            self.held.update(zip(names, self.group.broadcast(None), strict=True))

        return self._do("receive", call)

    def finish(self, version: Version) -> Future[None]:
        def call() -> None:
            self.version, self.whole = version, True

        return self._do("finish", call)


def buckets(step: int) -> list[list[Named]]:
    return [[(f"{i}.{j}", torch.full((3,), step * 10.0 + i + j)) for j in range(2)] for i in (0, 1)]


def weights(step: int) -> dict[str, float]:
    return {name: float(tensor[0]) for bucket in buckets(step) for name, tensor in bucket}


def held(receiver: FakeReceiver) -> dict[str, float]:
    return {name: float(tensor[0]) for name, tensor in receiver.held.items()}


@given(st.lists(st.sets(st.sampled_from("abcd")), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_whoever_is_named_is_loaded(memberships: list[set[str]]) -> None:
    """Any order of any members; the group is made anew only when they change."""
    sender, all_receivers = FakeSender(), {name: FakeReceiver() for name in "abcd"}
    transfer = NativeTransfer(sender, timeout_s=30)
    groups, before = 0, set[str]()
    for step, names in enumerate(memberships):
        receivers = {name: all_receivers[name] for name in sorted(names)}
        result = transfer.sync(Version(1, step), buckets(step), receivers)
        assert set(result.loaded) == names
        assert not result.broken
        assert not result.behind
        for receiver in receivers.values():
            assert held(receiver) == weights(step)
            assert receiver.version == Version(1, step)
        if names:
            groups += names != before
            before = names
            assert sorted(r.ranks[-1] for r in receivers.values()) == list(range(1, len(names) + 1))
    assert len(sender.groups) == groups
    transfer.close()


@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize("call", ["join", "begin", "receive", "finish"])
def test_a_failed_member_ends_the_sync_in_time_and_the_next_one_goes_without_it(
    call: str, fault: str
) -> None:
    good, bad = FakeReceiver(), FakeReceiver({call: fault})
    transfer = NativeTransfer(FakeSender(), timeout_s=TIMEOUT_S)
    started = time.monotonic()
    result = transfer.sync(Version(1, 0), buckets(0), {"good": good, "bad": bad})
    # Three times the deadline: this machine's other processes may take its cores meanwhile.
    assert time.monotonic() - started < 3 * TIMEOUT_S + 5
    assert not result.loaded
    assert "bad" in result.broken
    assert call in result.broken["bad"]
    # Half-loaded members are never called whole.
    assert all(r.whole or name in result.broken for name, r in {"good": good, "bad": bad}.items())
    assert set(result.broken) | set(result.behind) == {"good", "bad"}
    fresh = FakeReceiver()
    again = transfer.sync(Version(1, 1), buckets(1), {"fresh": fresh})
    assert again.loaded == ("fresh",)
    assert held(fresh) == weights(1)
    transfer.close()


def test_nobody_that_had_not_begun_is_replaced() -> None:
    """A member that dies as it is asked to join; the other one had answered."""

    class Quick(FakeReceiver):
        def join(self, init_info: Mapping[str, Any]) -> Future[None]:
            done: Future[None] = Future()
            done.set_result(None)
            return done

    result = NativeTransfer(FakeSender(), timeout_s=TIMEOUT_S).sync(
        Version(1, 0), buckets(0), {"good": Quick(), "bad": FakeReceiver({"join": "dies"})}
    )
    assert result.behind == ("good",)
    assert set(result.broken) == {"bad"}


@pytest.mark.parametrize("call", ["open", "connect", "offer", "transmit"])
def test_a_sender_that_fails_ends_the_sync_and_not_the_run(call: str) -> None:
    """Its sockets, its NCCL, its device: the store is the way then."""
    sender, receiver = FakeSender(), FakeReceiver()
    transfer = NativeTransfer(sender, timeout_s=TIMEOUT_S)

    def failing(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender, call, failing)
        result = transfer.sync(Version(1, 0), buckets(0), {"one": receiver})
    assert not result.loaded
    # Once asked to join, a member may hang in the collective.
    assert set(result.behind) == ({"one"} if call == "open" else set())
    assert set(result.broken) == (set() if call == "open" else {"one"})
    assert all("CUDA error" in why or "no answer" in why for why in result.broken.values())
    fresh = FakeReceiver()
    assert transfer.sync(Version(1, 1), buckets(1), {"fresh": fresh}).loaded == ("fresh",)
    assert held(fresh) == weights(1)
    transfer.close()


def test_a_source_that_fails_gives_the_group_up() -> None:
    def failing() -> Iterator[list[Named]]:
        yield buckets(0)[0]
        raise RuntimeError("gathering failed")

    sender = FakeSender()
    with pytest.raises(RuntimeError, match="gathering failed"):
        NativeTransfer(sender, timeout_s=30).sync(Version(1, 0), failing(), {"a": FakeReceiver()})
    assert sender.groups[-1].barrier.broken
