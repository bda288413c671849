"""The protocol around native transports, with a collective of threads in the place of NCCL."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.types import Version
from raygrpo.weights.native import (
    Begin,
    Finish,
    Join,
    Message,
    Named,
    NativeTransfer,
    Offer,
    Receive,
)
from raygrpo.weights.types import Probe, WeightsManifest

TIMEOUT_S = 0.3


class Group:
    """A broadcast group: as with NCCL, all ranks must take part in all that is done, or all hang.

    A rank that never comes leaves the others waiting until the group is given up.
    """

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.sent: list[Tensor] = []
        self.ranks: set[int] = set()

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

    def open(self, world_size: int) -> Offer:
        self.groups.append(Group(world_size))
        return {"group": self.groups[-1]}, self.groups[-1].enter

    def offer(self, bucket: list[Named]) -> Offer:
        tensors = [tensor for _, tensor in bucket]
        return {"names": [name for name, _ in bucket]}, lambda: self.transmit(tensors)

    def transmit(self, tensors: list[Tensor]) -> None:
        self.groups[-1].broadcast(tensors)

    def close(self) -> None:
        if self.groups:
            self.groups[-1].barrier.abort()


class FakeReceiver:
    """An engine on a thread of its own; ``fault`` maps a message's kind to what happens instead."""

    def __init__(self, fault: Mapping[type[Message], str] = {}) -> None:
        self.fault = dict(fault)
        self.held: dict[str, Tensor] = {}
        self.version: Version | None = None
        self.whole = True
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, message: Message) -> Future[None]:
        fault = self.fault.pop(type(message), "")
        if not fault:
            return self._pool.submit(self._take, message)
        future: Future[None] = Future()
        if fault == "dies":
            future.set_exception(RuntimeError("the actor died"))
        return future

    def _take(self, message: Message) -> None:
        match message:
            case Join(info):
                self.group = info["group"]
                self.group.ranks.add(info["rank_offset"])
                self.group.enter()
            case Begin():
                self.whole = False
            case Receive(info):
                self.held.update(zip(info["names"], self.group.broadcast(None), strict=True))
            case Finish(manifest):
                self.version, self.whole = manifest.version, True


def manifest(step: int, probe: Probe | None = None) -> WeightsManifest:
    return WeightsManifest(version=Version(1, step), buckets=(), probe=probe)


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
        assert not transfer.sync(manifest(step), buckets(step), receivers)
        for receiver in receivers.values():
            assert held(receiver) == weights(step)
            assert receiver.version == Version(1, step)
        if names:
            groups += names != before
            before = names
            assert sender.groups[-1].ranks == set(range(1, len(names) + 1))
    assert len(sender.groups) == groups
    transfer.close()


def loads_a_fresh_member(transfer: NativeTransfer) -> None:
    fresh = FakeReceiver()
    assert not transfer.sync(manifest(1), buckets(1), {"fresh": fresh})
    assert held(fresh) == weights(1)
    transfer.close()


@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize("kind", [Join, Begin, Receive, Finish])
def test_a_failed_member_ends_the_sync_in_time_and_the_next_one_goes_without_it(
    kind: type[Message], fault: str
) -> None:
    good, bad = FakeReceiver(), FakeReceiver({kind: fault})
    # A death ends the sync at once, silence at the deadline.
    transfer = NativeTransfer(FakeSender(), timeout_s=TIMEOUT_S if fault == "hangs" else 60.0)
    started = time.monotonic()
    broken = transfer.sync(manifest(0), buckets(0), {"good": good, "bad": bad})
    # Three times the deadline: this machine's other processes may take its cores meanwhile.
    assert time.monotonic() - started < 3 * TIMEOUT_S + 5
    assert kind.__name__.lower() in broken["bad"]
    assert good.whole or "good" in broken, "half-loaded members are never called whole"
    loads_a_fresh_member(transfer)


def test_nobody_that_had_not_begun_is_replaced() -> None:
    """A member that dies as it is asked to join; the other one had answered."""

    def quick(message: Message) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    receivers = {"good": quick, "bad": FakeReceiver({Join: "dies"})}
    broken = NativeTransfer(FakeSender(), timeout_s=TIMEOUT_S).sync(
        manifest(0), buckets(0), receivers
    )
    assert set(broken) == {"bad"}


@pytest.mark.parametrize("call", ["open", "enter", "offer", "transmit"])
def test_a_sender_that_fails_ends_the_sync_and_not_the_run(call: str) -> None:
    """Its sockets, its NCCL, its device: the store is the way then."""
    sender = FakeSender()
    transfer = NativeTransfer(sender, timeout_s=TIMEOUT_S)

    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group if call == "enter" else sender, call, failing)
        broken = transfer.sync(manifest(0), buckets(0), {"one": FakeReceiver()})
    # Once asked to join, a member may hang in the collective.
    assert set(broken) == (set() if call == "open" else {"one"})
    assert all("CUDA error" in why or "no answer" in why for why in broken.values())
    loads_a_fresh_member(transfer)


def test_a_source_that_fails_gives_the_group_up() -> None:
    def failing() -> Iterator[list[Named]]:
        yield buckets(0)[0]
        raise RuntimeError("gathering failed")

    sender = FakeSender()
    with pytest.raises(RuntimeError, match="gathering failed"):
        NativeTransfer(sender, timeout_s=30).sync(manifest(0), failing(), {"a": FakeReceiver()})
    assert sender.groups[-1].barrier.broken
