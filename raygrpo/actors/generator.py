"""A generator: an engine on a thread of its own, behind an asynchronous actor.

The actor owns the groups that it was asked for. A group waits for the engine to hold the version
that the group asks for; `GeneratorActor.load` brings that version.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from raygrpo.actors.engine_thread import EngineThread, fail, resolve
from raygrpo.actors.idle import IdleReading
from raygrpo.actors.process import keep_heap, log_to, on_sigterm
from raygrpo.actors.profiling import ProfileRequest
from raygrpo.actors.transport import make_receiver
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.actors.weight_sync import Answer, GroupKey, LoadReport, Partials, Proof, StoreReceiver
from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.engines.engine_weights import EngineWeights
from raygrpo.engines.probe import ProbeCheck
from raygrpo.errors import FOREIGN_INSIDE, InfraError, infra_errors
from raygrpo.types import Group, GroupRequest, Version

if TYPE_CHECKING:
    from raygrpo.actors.native_transfer import NativeReceiver
    from raygrpo.weights.native import Message

# How far apart groups arrive that are asked for at once.
TOGETHER_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationReport:
    """The small half of a generator's answer, for the driver.

    Attributes:
        aborted_tokens: None if the large half is a `Group` to score. Else the group was aborted,
            the large half is its partials, and this counts their tokens, say 113.
        idle: the engine's. A group that waits for weights leaves the engine idle.
    """

    group_id: int
    aborted_tokens: int | None = None
    idle: IdleReading | None = None


class GeneratorActor:
    """Serves group requests concurrently; weights change between decode steps.

    Without a ``store`` the engine serves the weights of ``model.path`` as version (0, 0).
    ``together_s`` is how long an engine at rest waits for further groups.
    """

    def __init__(
        self,
        config: RunConfig,
        store: StoreHandle | None,
        threads: int,
        profile: ProfileRequest | None = None,
        make_engine: Callable[..., Engine] | None = None,
        together_s: float = TOGETHER_S,
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._config, self._store, self._threads = config, store, threads
        self._make_engine = make_engine
        self._waiting: dict[GroupKey, asyncio.Future[Answer]] = {}
        self._leaving = False
        # A deterministic engine decodes groups one by one.
        together_s = 0.0 if config.deterministic else together_s
        self._thread = EngineThread(
            self._take_group, self._fail_all, together_s=together_s, profile=profile
        )
        self._proof = Proof(
            ProbeCheck(config.model.dtype, config.sampling.temperature),
            self._thread,
            self._answer,
            # On-policy, nothing is decoded during a load.
            beside_decoding=config.train.max_staleness > 0,
        )
        self._receiver: StoreReceiver | None = None

    async def start(self, log: str | None) -> int:
        """Makes the engine; returns the process id. (A constructor's errors lose their type.)"""
        log_to(log)
        if not self._config.ray.gpus.generator:
            keep_heap()
        await self._thread.start(self._new_engine)
        if self._store is not None:
            weights = EngineWeights(self._thread.engine, self._config, self._threads)
            self._receiver = make_receiver(
                self._config, self._store, weights, self._thread, self._proof
            )
        loop = asyncio.get_running_loop()
        on_sigterm(lambda: loop.call_soon_threadsafe(self._leave))
        return os.getpid()

    def _new_engine(self) -> Engine:
        version = Version(0, 0) if self._store is None else None
        if self._make_engine is not None:
            return self._make_engine(self._config, threads=self._threads, version=version)
        # It imports torch, which simulated engines do without.
        from raygrpo.engines.select import make_engine

        return make_engine(self._config, threads=self._threads, version=version)

    async def generate(
        self, request: GroupRequest, partials: Partials = ()
    ) -> tuple[GenerationReport, Answer]:
        """Generates a group, or the rest of it.

        Called with ``num_returns=2``, so that the driver owns both halves of the answer.
        """
        whole = replace(request, partials=partials)
        written: Answer = partials
        if not whole.unfinished:  # the last completion ended as the group was aborted
            written = Group(request=request, completions=partials)
        elif not self._leaving:
            written = await self._submit(whole) or partials
        aborted = None
        if not isinstance(written, Group):
            aborted = sum(completion.token_ids.size for completion in written)
        report = GenerationReport(
            group_id=request.group_id, aborted_tokens=aborted, idle=self._thread.idle.read()
        )
        return report, written

    async def _submit(self, request: GroupRequest) -> Answer:
        key = _key(request)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[key] = answer
        try:
            await self._thread.submit(request)
            return await answer
        finally:
            self._waiting.pop(key, None)

    async def abort(self) -> None:
        """Ends generation for good: each `generate`, now and later, answers with partials."""
        await self._leave()

    def _leave(self) -> asyncio.Future[None]:
        self._leaving = True
        loop = asyncio.get_running_loop()

        def abort_all() -> None:
            for key in list(self._waiting):
                partials = tuple(self._thread.engine.abort(key[0], key[1]))
                loop.call_soon_threadsafe(self._proof.give, key, partials)

        return self._thread.post(abort_all)

    async def load(self, normal_gap: float | None = None) -> LoadReport:
        """Brings the engine to the newest version, while decoding goes on.

        ``normal_gap`` is the probe's gap at the run's first version, once that is known.

        Raises:
            InfraError: any failure here; the version is not in use, or only half.
        """
        if normal_gap is not None:
            self._proof.check.normal_gap = normal_gap
        with infra_errors("a load of weights", FOREIGN_INSIDE, all_errors=True):
            return await self._the_receiver.load()

    async def sleep(self) -> None:
        """Has the engine free its device until the next `load`.

        Raises:
            InfraError: any failure.
        """
        with infra_errors("freeing the engine's device", FOREIGN_INSIDE, all_errors=True):
            await self._the_receiver.sleep()

    async def transfer(self, message: Message) -> None:
        """Takes a message of a direct transfer from the learner."""
        await cast("NativeReceiver", self._the_receiver).transfer(message)

    @property
    def _the_receiver(self) -> StoreReceiver:
        if self._receiver is None:
            raise InfraError("a generator without a weight store loads no weights")
        return self._receiver

    @property
    def engine(self) -> Engine:
        """The engine, for code that runs in this process."""
        return self._thread.engine

    def _take_group(self, group: Group) -> None:
        self._proof.give(_key(group.request), group)

    def _answer(self, key: GroupKey, answer: Answer) -> None:
        if (future := self._waiting.get(key)) is not None:
            resolve(future, answer)

    def _fail_all(self, error: BaseException) -> None:
        for future in self._waiting.values():
            fail(future, error)


def _key(request: GroupRequest) -> GroupKey:
    return request.stream, request.group_id, request.attempt
