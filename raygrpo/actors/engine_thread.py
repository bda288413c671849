"""The one thread that owns a generator's engine.

It makes the engine, runs commands between two decode steps, and hands finished groups on. While the
engine has nothing to decode, the thread waits for a command.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from raygrpo.actors.idle import IdleClock
from raygrpo.actors.profiling import EngineTracer, ProfileRequest
from raygrpo.engines.base import Engine
from raygrpo.errors import EngineBroken, InfraError, infra_error
from raygrpo.types import Group, GroupRequest

T = TypeVar("T")


class EngineThread:
    """Runs an engine; all methods but `start` may be called on the event loop's thread only.

    ``on_group`` takes each finished group, ``on_failure`` the error that ended the engine; both
    run on the event loop. ``together_s`` is how long an engine at rest waits for more groups after
    the first, so that groups that are asked for together start together.

    Attributes:
        idle: for how long the engine had nothing to decode.
    """

    def __init__(
        self,
        on_group: Callable[[Group], None],
        on_failure: Callable[[BaseException], None],
        *,
        together_s: float,
        profile: ProfileRequest | None = None,
    ) -> None:
        self._on_group, self._on_failure = on_group, on_failure
        self._together_s, self._profile = together_s, profile
        self.idle = IdleClock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._traced: Engine | EngineTracer | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]]
        self._commands = queue.SimpleQueue()

    @property
    def engine(self) -> Engine:
        """The engine, once `start` has returned."""
        assert self._engine is not None, "the engine has not been made"
        return self._engine

    async def start(self, make_engine: Callable[[], Engine]) -> None:
        """Makes the engine on the new thread; raises what ``make_engine`` raises."""
        self._loop = asyncio.get_running_loop()
        made: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(
            target=self._run, args=(make_engine, made), name="engine", daemon=True
        ).start()
        await made

    def post(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Has the engine's thread run ``call`` between two steps."""
        done: asyncio.Future[T] = self._the_loop.create_future()
        self._commands.put((call, done))
        return done

    async def run(self, call: Callable[[], T]) -> T:
        """`post`, and waits for the outcome."""
        return await self.post(call)

    async def submit(self, request: GroupRequest) -> None:
        """Gives the engine a group."""
        assert self._traced is not None
        traced = self._traced
        await self.run(lambda: traced.submit(request))

    @property
    def _the_loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "the engine's thread has not been started"
        return self._loop

    def _run(self, make_engine: Callable[[], Engine], made: asyncio.Future[None]) -> None:
        # Only this thread and `in_new_thread`s compute: see there.
        try:
            self._engine = self._traced = make_engine()
        except Exception as error:
            self._the_loop.call_soon_threadsafe(fail, made, error)
            return
        if self._profile is not None:
            self._traced = EngineTracer(self._engine, self._profile, "generator-0")
        self._the_loop.call_soon_threadsafe(resolve, made, None)
        try:
            self._serve(self._traced)
        except Exception as error:
            broken = _broken(error)
            self._the_loop.call_soon_threadsafe(self._on_failure, broken)
            while True:  # every later command fails by the error that broke the engine
                _, done = self._commands.get()
                self._the_loop.call_soon_threadsafe(fail, done, broken)

    def _serve(self, engine: Engine | EngineTracer) -> None:
        while True:
            self._run_commands()
            for group in engine.step():
                self._the_loop.call_soon_threadsafe(self._on_group, group)

    def _run_commands(self) -> None:
        """Runs the commands that have come; at rest, waits for one and a moment for more."""
        together_until = 0.0
        while True:
            at_rest = not self.engine.can_step
            if at_rest:
                self.idle.mark(busy=False)
            wait_s = max(0.0, together_until - time.monotonic())
            try:
                call, done = self._commands.get(timeout=None if at_rest else wait_s)
            except queue.Empty:
                return
            self.idle.mark(busy=True)
            if at_rest:
                together_until = time.monotonic() + self._together_s
            try:
                outcome = call()
            except Exception as error:
                self._the_loop.call_soon_threadsafe(fail, done, error)
            else:
                self._the_loop.call_soon_threadsafe(resolve, done, outcome)


def resolve(future: asyncio.Future[T], value: T) -> None:
    """Sets a result, unless the future has an outcome."""
    if not future.done():
        future.set_result(value)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Sets an error, unless the future has an outcome."""
    if not future.done():
        future.set_exception(error)


def _broken(error: Exception) -> Exception:
    """The answer of an engine that failed by ``error``.

    A machine's fault is EngineBroken: another process may do better. A bug stays the error that it
    is, and so do bad numbers.
    """
    known = error if isinstance(error, InfraError) else infra_error(error, "the engine")
    if known is None:
        return error
    traceback.print_exception(error)
    broken = EngineBroken(f"the engine failed: {known.message}", "the generator is replaced")
    broken.__cause__ = error
    return broken
