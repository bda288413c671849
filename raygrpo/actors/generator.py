"""A generator: an engine on a thread of its own, behind an asynchronous actor."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import ray.exceptions

from raygrpo.actors.idle import IdleClock, IdleReading
from raygrpo.actors.process import in_new_thread, keep_heap, log_to, on_sigterm
from raygrpo.actors.profiling import EngineTracer, ProfileRequest
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.engines.probe import ProbeCheck
from raygrpo.errors import EngineBroken, InfraError, RayGrpoError
from raygrpo.types import ByteArray, Completion, Group, GroupRequest, Stream, Version
from raygrpo.weights.replica import Replica, Staged, WeightLink
from raygrpo.weights.types import WeightsManifest

Partials = tuple[Completion, ...]
GroupKey = tuple[Stream, int, int]

T = TypeVar("T")

# How far apart groups that are asked for at once come in.
_TOGETHER_S = 0.01

# torch's, by name: this module does without torch.
_DEVICE_ERRORS = ("OutOfMemoryError", "AcceleratorError")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationReport:
    """The small half of a generator's answer, which says what the other half is: a group to score,
    or, with ``aborted_tokens``, what was written of one that was aborted.

    ``idle`` is of the engine: a group that it must not decode yet leaves it idle too.
    """

    group_id: int
    aborted_tokens: int | None = None
    idle: IdleReading | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A finished load: the version held, and what it took.

    ``num_bytes`` were pulled for ``full_bytes`` of weights: nothing (kind ``none``), a chain of
    deltas, or a whole version with those on it (``full``). ``load_s`` is from call to loaded,
    ``stall_s`` what decoding lost of it, ``probe_s`` what the proof took of it; ``probe_gap`` is
    the last probe's.
    """

    version: Version
    kind: Literal["none", "delta", "full"]
    num_bytes: int
    full_bytes: int
    load_s: float
    stall_s: float
    probe_s: float = 0.0
    probe_gap: float | None = None
    idle: IdleReading | None = None


class GeneratorActor:
    """Serves group requests concurrently; weights land between decode steps.

    Without a ``store`` it serves the weights of ``model.path`` as version (0, 0).
    """

    def __init__(
        self,
        config: RunConfig,
        store: StoreHandle | None,
        threads: int,
        profile: ProfileRequest | None = None,
        make_engine: Callable[..., Engine] | None = None,
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._config = config
        self._threads = threads
        self._store = store
        self._profile = profile
        self._make_engine = make_engine
        # For the engine's thread: it runs the call, and its outcome resolves the future.
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]]
        self._commands = queue.SimpleQueue()
        self._waiting: dict[tuple[Stream, int, int], asyncio.Future[Group | Partials]] = {}
        self._leaving = False
        self._idle = IdleClock()
        self._replica = Replica(threads)
        self._probe = ProbeCheck(config.model.dtype, config.sampling.temperature)
        self._unproven: list[tuple[GroupKey, Group | Partials]] | None = None
        self._loading = asyncio.Lock()
        self._asleep = False

    async def start(self, log: str | None) -> int:
        """Loads the engine (not in the constructor, whose errors lose their type); the pid."""
        log_to(log)
        if not self._config.ray.gpus.generator:
            keep_heap()
        version = Version(0, 0) if self._store is None else None
        self._loop = asyncio.get_running_loop()
        made: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._run, args=(version, made), name="engine", daemon=True).start()
        await made
        on_sigterm(lambda: self._loop.call_soon_threadsafe(self._leave))
        return os.getpid()

    def _new_engine(self, version: Version | None) -> Engine:
        if self._make_engine is not None:
            return self._make_engine(self._config, threads=self._threads, version=version)
        from raygrpo.engines.select import make_engine
        from raygrpo.weights.adapter import AdapterBase

        self._adapter_base = AdapterBase(self._config)
        return make_engine(self._config, threads=self._threads, version=version)

    async def generate(
        self, request: GroupRequest, partials: Partials = ()
    ) -> tuple[GenerationReport, Group | Partials]:
        """Generates a group, or the rest of it; called with ``num_returns=2`` so that the driver
        owns both halves of the answer."""
        whole = replace(request, partials=partials)
        written: Group | Partials = partials
        if not whole.unfinished:  # the last completion ended as the group was aborted
            written = Group(request=request, completions=partials)
        elif not self._leaving:
            written = await self._submit(whole) or partials
        aborted = None
        if not isinstance(written, Group):
            aborted = sum(completion.token_ids.size for completion in written)
        report = GenerationReport(
            group_id=request.group_id, aborted_tokens=aborted, idle=self._idle.read()
        )
        return report, written

    async def abort(self) -> None:
        """Ends generation: each open `generate` answers with what is written, for others to go on
        with; so does each that comes later."""
        await self._leave()

    def _leave(self) -> asyncio.Future[None]:
        self._leaving = True
        done: asyncio.Future[None] = self._loop.create_future()
        self._commands.put((self._abort_all, done))
        return done

    def _abort_all(self) -> None:
        for key in list(self._waiting):
            partials = tuple(self._engine.abort(key[0], key[1]))
            self._loop.call_soon_threadsafe(self._finish, key, partials)

    async def load(self, normal_gap: float | None = None) -> LoadReport:
        """Pulls what leads to the store's newest version; returns once the engine holds it.

        The version is built on a thread of its own while decoding goes on. ``normal_gap`` is what
        the probe found at the run's first version, once that is known.

        Raises:
            InfraError: anything that went wrong here; the version is not, or only half, in use.
        """
        if normal_gap is not None:
            self._probe.normal_gap = normal_gap
        with _of_infrastructure("a version did not load"):
            return await self._load()

    async def _load(self) -> LoadReport:
        started = time.monotonic()
        assert self._store is not None, "without a store there is nothing to load"
        async with self._loading:
            links = await self._store.pull(self._replica.version)
            if self._asleep:  # only now: where the pull fails, the learner publishes again first
                await self._on_engine(self._engine.wake)
            stall_s = probe_s = 0.0
            if links:
                stage = partial(self._stage, links)
                staged = await asyncio.wrap_future(in_new_thread(stage, "stage"))
                self._unproven = []
                old = self._replica.held()
                stall_s = await self._on_engine(lambda: self._commit(staged))
                in_new_thread(old.clear, "release")  # unmapping takes longer than the commit
                probe_s = await self._prove(staged.manifest)
            elif self._asleep and self._engine.version is None:  # it gave its weights up
                self._unproven = []
                stall_s = await self._on_engine(self._load_again)
                probe_s = await self._prove(self._replica.current.manifest)
            self._asleep = False  # only now: a load that fails before leaves it to the next one
            held = self._replica.current.manifest
        whole = bool(links) and links[0][0].kind != "delta"
        return LoadReport(
            version=held.version,
            kind="full" if whole else "delta" if links else "none",
            num_bytes=sum(manifest.sent_bytes for manifest, _ in links),
            full_bytes=held.num_bytes,
            load_s=time.monotonic() - started,
            stall_s=stall_s,
            probe_s=probe_s,
            probe_gap=self._probe.last_gap,
            idle=self._idle.read(),
        )

    async def sleep(self) -> None:
        """Has the engine free its device until the next `load`.

        Raises:
            InfraError: anything that went wrong.
        """
        async with self._loading:
            with _of_infrastructure("the engine did not free its device"):
                await self._on_engine(self._engine.sleep)
            self._asleep = True

    def _stage(self, links: Sequence[WeightLink]) -> Staged:
        staged = self._replica.stage(links)
        self._engine.stage_weights(*self._whole(staged))
        return staged

    def _whole(self, held: Staged) -> tuple[WeightsManifest, list[ByteArray]]:
        """What an engine loads: an adapter merged into its base."""
        manifest, buckets = held.manifest, list(held.buckets)
        if manifest.kind == "adapter":
            return self._adapter_base.full_version(manifest, buckets)
        return manifest, buckets

    def _load_again(self) -> float:
        """Puts the replica's version into an engine that holds none; the seconds that it took."""
        started = time.monotonic()
        self._engine.load_weights(*self._whole(self._replica.current))
        return time.monotonic() - started

    def _commit(self, staged: Staged) -> float:
        """Puts the staged version into use, on the engine's thread; the seconds that it took."""
        started = time.monotonic()
        self._engine.commit_weights()
        self._replica.commit(staged)
        return time.monotonic() - started

    async def _prove(self, manifest: WeightsManifest) -> float:
        """Checks the version in use by its probe; the seconds that it took.

        What is written meanwhile is answered after that: decoding does not wait for it, and a
        version that fails has served nothing.
        """
        started = time.monotonic()
        if manifest.probe is not None:
            check = partial(self._probe.check, self._engine, manifest.probe, manifest.version)
            if self._config.train.max_staleness:
                await asyncio.wrap_future(in_new_thread(check, "probe"))
            else:  # on-policy, nothing was decoded anyway
                await self._on_engine(check)
        written, self._unproven = self._unproven or [], None
        for key, answer in written:
            self._finish(key, answer)
        return time.monotonic() - started

    async def _submit(self, request: GroupRequest) -> Group | Partials:
        finished: asyncio.Future[Group | Partials] = self._loop.create_future()
        key = (request.stream, request.group_id, request.attempt)
        self._waiting[key] = finished
        try:
            await self._on_engine(lambda: self._traced.submit(request))
            return await finished
        finally:
            self._waiting.pop(key, None)

    async def _on_engine(self, call: Callable[[], T]) -> T:
        """Runs ``call`` on the engine's thread, between two steps."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._commands.put((call, done))
        return await done

    def _run(self, version: Version | None, made: asyncio.Future[None]) -> None:
        """The engine's thread, which makes it and serves until the process ends.

        See `raygrpo.actors.process.in_new_thread` on why no other thread does.
        """
        try:
            self._engine = self._new_engine(version)
        except Exception as error:
            self._loop.call_soon_threadsafe(_fail, made, error)
            return
        self._traced: Engine | EngineTracer = self._engine
        if self._profile is not None:
            self._traced = EngineTracer(self._engine, self._profile, "generator-0")
        self._loop.call_soon_threadsafe(_resolve, made, None)
        self._serve()

    def _serve(self) -> None:
        """Commands between steps; a step that fails fails every request."""
        while True:
            self._run_commands()
            try:
                groups = self._traced.step()
            except Exception as error:
                broken = _broken(error)
                self._loop.call_soon_threadsafe(self._fail_all, broken)
                self._serve_nothing(broken)
            for group in groups:
                request = group.request
                key = (request.stream, request.group_id, request.attempt)
                self._loop.call_soon_threadsafe(self._finish, key, group)

    def _serve_nothing(self, error: BaseException) -> None:
        """A broken engine answers whatever still comes with the error that broke it."""
        while True:
            _, done = self._commands.get()
            self._loop.call_soon_threadsafe(_fail, done, error)

    def _run_commands(self) -> None:
        """Runs what has come; at rest, waits for work, and a moment more for what comes with it:
        groups that are asked for together start together."""
        together_until = 0.0
        while True:
            at_rest = not self._engine.can_step
            if at_rest:
                self._idle.mark(busy=False)
            wait_s = max(0.0, together_until - time.monotonic())
            try:
                call, done = self._commands.get(timeout=None if at_rest else wait_s)
            except queue.Empty:
                return
            self._idle.mark(busy=True)
            if at_rest and not self._config.deterministic:  # else groups come one by one
                together_until = time.monotonic() + _TOGETHER_S
            try:
                outcome = call()
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, done, error)
            else:
                self._loop.call_soon_threadsafe(_resolve, done, outcome)

    def _finish(self, key: tuple[Stream, int, int], written: Group | Partials) -> None:
        if self._unproven is not None:
            self._unproven.append((key, written))
        elif (future := self._waiting.get(key)) is not None:
            _resolve(future, written)

    def _fail_all(self, error: BaseException) -> None:
        for future in self._waiting.values():
            _fail(future, error)


@contextmanager
def _of_infrastructure(what: str) -> Iterator[None]:
    """Makes any error of memory, torch or vLLM an InfraError: the next process may do better."""
    try:
        yield
    except (RayGrpoError, ray.exceptions.RayError):
        raise
    except Exception as error:
        traceback.print_exc()
        raise InfraError(f"{what}: {_described(error)}") from error


def _broken(error: Exception) -> Exception:
    """What an engine answers that failed by ``error``: what is no fault of its machine's is a bug,
    or bad numbers, and stays what it is."""
    of_device = type(error).__name__ in _DEVICE_ERRORS
    if not (of_device or isinstance(error, InfraError)):
        return error
    traceback.print_exception(error)
    broken = EngineBroken(f"the engine failed: {_described(error)}", "the generator is replaced")
    broken.__cause__ = error
    return broken


def _described(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, RayGrpoError) else f"{type(error).__name__}: {first}"


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
