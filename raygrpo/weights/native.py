"""Native transports: a version straight from the learner to the engines, past the store.

`NativeTransfer` is the protocol around a collective. The members are an input to each sync. The
group is made again when its members change. Buckets go in order. Every wait has the sync's one
deadline. When anything fails, the group is given up: members that had begun may be half-loaded and
are replaced, and the others take the version from the store, as late joiners do.

`raygrpo.engines.vllm.native` has the collectives. No GPU has run them yet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from raygrpo.errors import InfraError
from raygrpo.types import Version

Named = tuple[str, Tensor]
T = TypeVar("T")


class Receiver(Protocol):
    """One engine's end. Every call returns at once, with a future of its outcome."""

    @property
    def num_workers(self) -> int:
        """Processes of this engine that take part, one rank each."""

    def join(self, init_info: Mapping[str, Any]) -> Future[None]:
        """Enters the group that ``init_info`` describes, and leaves any older one."""

    def begin(self) -> Future[None]:
        """Opens an update: until the end of `finish` nothing else may use the engine."""

    def receive(self, update_info: Mapping[str, Any]) -> Future[None]:
        """Takes one bucket, while the sender transmits it."""

    def finish(self, version: Version) -> Future[None]:
        """Closes the update: the engine holds ``version``."""


class Sender(Protocol):
    """The learner's end, rank 0 of the group. Calls block, `close` excepted."""

    def open(self, world_size: int) -> dict[str, Any]:
        """Prepares a new group; returns the ``init_info`` of receivers, without their ranks."""

    def connect(self) -> None:
        """Waits for all receivers to enter."""

    def offer(self, bucket: list[Named]) -> dict[str, Any]:
        """Makes a bucket ready; returns its ``update_info`` for receivers."""

    def transmit(self) -> None:
        """Sends the bucket that was offered last."""

    def close(self) -> None:
        """Gives the group up, without waiting for anybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferResult:
    """The receivers of a sync by name; each name is in one of three fields.

    ``loaded`` hold the version. ``broken`` (with the reason) may be half-loaded and must be
    replaced. ``behind`` are as they were before, and must take the version from the store.
    """

    loaded: tuple[str, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ()


class NativeTransfer:
    """Syncs one sender with the receivers that are there."""

    def __init__(self, sender: Sender, timeout_s: float) -> None:
        self._sender = sender
        self._timeout_s = timeout_s
        self._group: dict[str, Receiver] = {}

    def sync(
        self, version: Version, buckets: Iterable[list[Named]], receivers: Mapping[str, Receiver]
    ) -> TransferResult:
        """Sends a version to ``receivers``; never raises for a failure of theirs or of the group.

        ``buckets`` is not read further after a failure; where reading it is collective (ZeRO-3),
        the caller reads the rest.
        """
        if not receivers:
            return TransferResult()
        attempt = _Attempt(dict(receivers), time.monotonic() + self._timeout_s)
        try:
            self._regroup(attempt)
            attempt.begun = True
            attempt.wait("begin", {name: item.begin() for name, item in receivers.items()})
            for bucket in buckets:
                info = attempt.call("offer", partial(self._sender.offer, bucket))
                sent = _call(self._sender.transmit)
                taken = {name: item.receive(info) for name, item in receivers.items()}
                attempt.wait("receive", taken, sent)
            attempt.wait("finish", {name: item.finish(version) for name, item in receivers.items()})
        except _Aborted:
            self.close()
            return attempt.result()
        except BaseException:  # the source's own error: the open update never ends
            self.close()
            raise
        return TransferResult(loaded=tuple(receivers))

    def close(self) -> None:
        """Gives up the group; the next sync makes a new one."""
        self._group = {}
        self._sender.close()

    def _regroup(self, attempt: _Attempt) -> None:
        """Makes a new group unless exactly these receivers are in the one there is."""
        if attempt.receivers == self._group:
            return
        if self._group:
            self.close()
        ranks, world_size = {}, 1
        for name, receiver in attempt.receivers.items():
            ranks[name], world_size = world_size, world_size + receiver.num_workers
        info = attempt.call("open", partial(self._sender.open, world_size))
        joins = {
            name: receiver.join({**info, "rank_offset": ranks[name]})
            for name, receiver in attempt.receivers.items()
        }
        attempt.wait("join", joins, _call(self._sender.connect))
        self._group = attempt.receivers


class _Aborted(Exception):
    """The sync cannot go on; the attempt knows why."""


@dataclass(slots=True)
class _Attempt:
    """One sync: its members, its deadline and what failed."""

    receivers: dict[str, Receiver]
    deadline: float
    begun: bool = False
    failures: dict[str, str] = field(default_factory=dict)

    def call(self, what: str, ours: Callable[[], T]) -> T:
        """A call to the sender alone; its failure is the sync's."""
        try:
            return ours()
        except (OSError, RuntimeError, InfraError) as error:  # sockets, CUDA, NCCL
            self.failures[""] = f"{what}: {error}"
            raise _Aborted from error

    def wait(
        self, what: str, futures: Mapping[str, Future[None]], ours: Future[None] | None = None
    ) -> None:
        """Waits for all members; the first failure ends the sync, since all others wait for it.

        A member without an answer at that time may hang in the collective, and counts as broken.
        """
        parts = {**futures, **({"": ours} if ours else {})}
        while open_parts := {name: part for name, part in parts.items() if not part.done()}:
            if any(part.done() and part.exception() for part in parts.values()):
                break
            left = self.deadline - time.monotonic()
            if left <= 0:
                break
            _wait_any(open_parts.values(), left)
        for name, part in parts.items():
            error = part.exception() if part.done() else "no answer"
            if error is not None:
                self.failures[name] = f"{what}: {error}"
        if self.failures:
            raise _Aborted

    def result(self) -> TransferResult:
        """The members to replace, and those that can go on."""
        reason = "; ".join(
            f"{name or 'the sender'}: {why}" for name, why in sorted(self.failures.items())
        )
        broken = {
            name: self.failures.get(name, f"the sync was given up ({reason})")
            for name in self.receivers
            if self.begun or name in self.failures
        }
        behind = tuple(name for name in self.receivers if name not in broken)
        return TransferResult(broken=broken, behind=behind)


def _wait_any(futures: Iterable[Future[None]], timeout_s: float) -> None:
    """Returns when one of the futures is done or the time is over."""
    ended = threading.Event()
    for future in futures:
        future.add_done_callback(lambda _: ended.set())
    ended.wait(timeout_s)


def _call(function: Callable[[], None]) -> Future[None]:
    """Runs a call that may hang for ever, on a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            function()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    return future
