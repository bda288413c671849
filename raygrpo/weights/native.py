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
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from torch import Tensor

from raygrpo.errors import InfraError
from raygrpo.weights.types import WeightsManifest

Named = tuple[str, Tensor]
SENDER: Final = "the sender"


@dataclass(frozen=True, slots=True)
class Join:
    """Enter the group that ``init_info`` describes, and leave any older one."""

    init_info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Begin:
    """Open an update: until the end of `Finish` nothing else may use the engine."""


@dataclass(frozen=True, slots=True)
class Receive:
    """Take one bucket, while the sender transmits it."""

    update_info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """Close the update: the engine holds the manifest's version. The manifest has no buckets."""

    manifest: WeightsManifest


Message = Join | Begin | Receive | Finish
# One engine's end: returns at once, with a future of the outcome.
Receiver = Callable[[Message], Future[None]]
# The information for the receivers, and the sender's part, which blocks until they take theirs.
Offer = tuple[dict[str, Any], Callable[[], None]]


class Sender(Protocol):
    """The learner's end, rank 0 of the group."""

    def open(self, world_size: int) -> Offer:
        """Prepares a new group: ``init_info`` without the receivers' ranks, and the meeting."""

    def offer(self, bucket: list[Named]) -> Offer:
        """Prepares a bucket: its ``update_info``, and the transmission."""

    def close(self) -> None:
        """Gives the group up, without waiting for anybody."""


class NativeTransfer:
    """Syncs one sender with the receivers that are there.

    Each receiver takes part with ``num_workers`` processes, one rank each.
    """

    def __init__(self, sender: Sender, timeout_s: float, num_workers: int = 1) -> None:
        self._sender, self._timeout_s, self._num_workers = sender, timeout_s, num_workers
        self._members: set[str] = set()  # of the group that there is

    def sync(
        self,
        manifest: WeightsManifest,
        buckets: Iterable[list[Named]],
        receivers: Mapping[str, Receiver],
    ) -> dict[str, str]:
        """Sends a version; never raises for a failure of the receivers or of the group.

        Returns the receivers that may be half-loaded and must be replaced, with the reason. The
        others hold the version or, after a failure, are as they were before.

        ``buckets`` is not read further after a failure; where reading it is collective (ZeRO-3),
        the caller reads the rest.
        """
        if not receivers:
            return {}
        deadline = time.monotonic() + self._timeout_s
        begun = False
        try:
            if self._members != set(receivers):
                self._regroup(receivers, deadline)
            begun = True
            _wait("begin", {name: tell(Begin()) for name, tell in receivers.items()}, deadline)
            for bucket in buckets:
                info, transmit = _offered("offer", partial(self._sender.offer, bucket))
                sent = _in_thread(transmit)
                taken = {name: tell(Receive(info)) for name, tell in receivers.items()}
                _wait("receive", {**taken, SENDER: sent}, deadline)
            finish = Finish(manifest)
            _wait("finish", {name: tell(finish) for name, tell in receivers.items()}, deadline)
        except _Aborted as aborted:
            self.close()
            failures = aborted.failures
            reason = "; ".join(f"{name}: {why}" for name, why in sorted(failures.items()))
            return {
                name: failures.get(name, f"the sync was given up ({reason})")
                for name in receivers
                if begun or name in failures
            }
        except BaseException:  # the source's own error: the open update never ends
            self.close()
            raise
        return {}

    def close(self) -> None:
        """Gives up the group; the next sync makes a new one."""
        self._members = set()
        self._sender.close()

    def _regroup(self, receivers: Mapping[str, Receiver], deadline: float) -> None:
        if self._members:
            self.close()
        world_size = 1 + self._num_workers * len(receivers)
        info, meet = _offered("open", partial(self._sender.open, world_size))
        ranks = range(1, world_size, self._num_workers)
        joins = {
            name: tell(Join({**info, "rank_offset": rank}))
            for rank, (name, tell) in zip(ranks, receivers.items(), strict=True)
        }
        _wait("join", {**joins, SENDER: _in_thread(meet)}, deadline)
        self._members = set(receivers)


class _Aborted(Exception):
    """The sync cannot go on: what failed, by the member's name."""

    def __init__(self, failures: Mapping[str, str]) -> None:
        super().__init__(failures)
        self.failures = failures


def _offered(what: str, prepare: Callable[[], Offer]) -> Offer:
    """The sender's preparation, before a receiver knows of it."""
    try:
        return prepare()
    except (OSError, RuntimeError, InfraError) as error:  # sockets, CUDA, NCCL
        raise _Aborted({SENDER: f"{what}: {error}"}) from error


def _wait(what: str, parts: Mapping[str, Future[None]], deadline: float) -> None:
    """Waits for all members; the first failure ends the sync, since all others wait for it.

    A member without an answer at that time may hang in the collective, and counts as broken.
    """
    wait(parts.values(), max(0.0, deadline - time.monotonic()), FIRST_EXCEPTION)
    failures = {}
    for name, part in parts.items():
        error = part.exception() if part.done() else "no answer"
        if error is not None:
            failures[name] = f"{what}: {error}"
    if failures:
        raise _Aborted(failures)


def _in_thread(call: Callable[[], None]) -> Future[None]:
    """Runs a call that may hang for ever, on a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            call()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    return future
