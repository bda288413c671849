"""A generator: an engine on a thread of its own, behind an asynchronous actor."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raygrpo.actors.spawn import log_to
from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.errors import ProbeFailed
from raygrpo.profiling import EngineTracer, ProfileRequest
from raygrpo.types import Group, GroupRequest, Version
from raygrpo.weights.probe import ProbeCheck
from raygrpo.weights.replica import Link, Replica, Staged


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationReport:
    """The small half of a generator's answer, which says that the other half is there to score."""

    group_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A finished load: the version held, and what it took.

    ``num_bytes`` were pulled for ``full_bytes`` of weights: nothing (kind ``none``), a chain of
    deltas, or a whole version with those on it (``full``). ``load_s`` is from call to loaded,
    ``stall_s`` what decoding lost of it, the probe included; ``probe_gap`` is the last probe's.
    """

    version: Version
    kind: Literal["none", "delta", "full"]
    num_bytes: int
    full_bytes: int
    load_s: float
    stall_s: float
    probe_gap: float | None = None


class GeneratorActor:
    """Serves group requests concurrently; weights land between decode steps.

    Without a ``store`` it serves the weights of ``model.path`` as version (0, 0).
    """

    def __init__(
        self, config: RunConfig, store: Any, threads: int, profile: ProfileRequest | None = None
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._config = config
        self._threads = threads
        self._store = store
        self._profile = profile
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]]
        self._commands = queue.SimpleQueue()
        self._waiting: dict[tuple[str, int, int], asyncio.Future[Group]] = {}
        self._replica = Replica()
        self._probe = ProbeCheck(config.model.dtype, config.sampling.temperature)
        self._loading = asyncio.Lock()

    async def start(self, log: str | None) -> int:
        """Loads the engine (not in the constructor, whose errors lose their type); the pid."""
        log_to(log)
        from raygrpo.engines.choose import make_engine
        from raygrpo.weights.adapter import AdapterBase

        self._adapter_base = AdapterBase(self._config)
        version = Version(0, 0) if self._store is None else None
        self._engine: Engine = make_engine(self._config, threads=self._threads, version=version)
        self._traced: Engine | EngineTracer = self._engine
        if self._profile is not None:
            self._traced = EngineTracer(self._engine, self._profile, "generator-0")
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        return os.getpid()

    async def generate(self, request: GroupRequest) -> tuple[GenerationReport, Group]:
        """Generates a group; called with ``num_returns=2`` so that the driver owns both halves."""
        group = await self._submit(request)
        return GenerationReport(group_id=request.group_id), group

    async def load(self) -> LoadReport:
        """Pulls what leads to the store's newest version; returns once the engine holds it.

        The version is built on a thread of its own while decoding goes on.
        """
        started = time.monotonic()
        async with self._loading:
            plan = await self._store.plan.remote(self._replica.version)
            links = [(manifest, await asyncio.gather(*refs)) for manifest, refs in plan]
            stall_s = 0.0
            if links:
                staged = await asyncio.to_thread(self._stage, links)
                done: asyncio.Future[float] = self._loop.create_future()
                self._enqueue(lambda: self._commit(staged), done)
                stall_s = await done
            held = self._replica.current.manifest
        whole = bool(links) and links[0][0].kind != "delta"
        return LoadReport(
            version=held.version,
            kind="full" if whole else "delta" if links else "none",
            num_bytes=sum(manifest.sent_bytes for manifest, _ in links),
            full_bytes=held.num_bytes,
            load_s=time.monotonic() - started,
            stall_s=stall_s,
            probe_gap=self._probe.last_gap,
        )

    def _stage(self, links: Sequence[Link]) -> Staged:
        staged = self._replica.stage(links)
        manifest, buckets = staged.manifest, list(staged.buckets)
        if manifest.kind == "adapter":
            manifest, buckets = self._adapter_base.full_version(manifest, buckets)
        self._engine.stage_weights(manifest, buckets)
        return staged

    def _commit(self, staged: Staged) -> float:
        """Puts the staged version into use, on the engine's thread; the seconds that it took."""
        started = time.monotonic()
        self._engine.commit_weights()
        self._replica.commit(staged)
        if (probe := staged.manifest.probe) is not None:
            self._probe.check(self._engine, probe, staged.manifest.version)
        return time.monotonic() - started

    async def _submit(self, request: GroupRequest) -> Group:
        finished: asyncio.Future[Group] = self._loop.create_future()
        key = (request.stream, request.group_id, request.attempt)
        self._waiting[key] = finished
        accepted: asyncio.Future[None] = self._loop.create_future()
        self._enqueue(lambda: self._traced.submit(request), accepted)
        try:
            await accepted
            return await finished
        finally:
            self._waiting.pop(key, None)

    def _enqueue(self, call: Callable[[], Any], done: asyncio.Future[Any]) -> None:
        """Runs ``call`` on the engine's thread and resolves ``done`` with its outcome."""
        self._commands.put((call, done))

    def _run(self) -> None:
        """The engine's thread: commands between steps; a step that fails fails every request."""
        while True:
            self._run_commands()
            try:
                groups = self._traced.step()
            except Exception as error:
                self._loop.call_soon_threadsafe(self._fail_all, error)
                self._serve_nothing(error)
            for group in groups:
                self._loop.call_soon_threadsafe(self._finish, group)

    def _serve_nothing(self, error: BaseException) -> None:
        """A broken engine answers whatever still comes with the error that broke it."""
        while True:
            _, done = self._commands.get()
            self._loop.call_soon_threadsafe(_fail, done, error)

    def _run_commands(self) -> None:
        while not self._engine.can_step or not self._commands.empty():
            call, done = self._commands.get()
            try:
                outcome = call()
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, done, error)
                if isinstance(error, ProbeFailed):
                    self._serve_nothing(error)
            else:
                self._loop.call_soon_threadsafe(_resolve, done, outcome)

    def _finish(self, group: Group) -> None:
        request = group.request
        future = self._waiting.get((request.stream, request.group_id, request.attempt))
        if future is not None:
            _resolve(future, group)

    def _fail_all(self, error: BaseException) -> None:
        for future in self._waiting.values():
            _fail(future, error)


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
