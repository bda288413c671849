"""The scorer's side of rewards: a child process for each, and the sum of their values."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from raygrpo.config import RewardSection
from raygrpo.config.sections import reward_name
from raygrpo.errors import ConfigError, RewardError
from raygrpo.rewards.cache import CachedReward
from raygrpo.rewards.contract import (
    Call,
    Reply,
    RewardBackend,
    ScoredGroup,
    Setup,
    TrainerState,
    make_call,
)
from raygrpo.rewards.wire import Channel
from raygrpo.types import Group, Score

GUARD = Path(__file__).with_name("guard.py")
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
MAX_STACK_BYTES = 1 << 16
REPLY = TypeAdapter(Reply)


class ChildFailed(RewardError):
    """A child missed a deadline, died, or could not load its function."""

    def __init__(self, error: str, traceback: str = "") -> None:
        super().__init__(f"{error}\n{traceback}".rstrip())
        self.error = error
        self.traceback = traceback or error


class RewardChild:
    """One reward function in a process of its own; a failing process is ended with its descendants.

    All methods but `close` are called by one thread.
    """

    def __init__(self, setup: Setup) -> None:
        self.name = setup.name
        self._setup = setup
        # Where the child leaves its stack when a deadline is near: shared memory outlives it.
        self._trace_fd = os.memfd_create("reward-stack")
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None

    def start(self) -> None:
        """Starts a process and loads the function, unless a process waits for a call.

        Raises:
            ChildFailed: the function cannot be loaded.
        """
        channel = self._channel
        if channel is not None and channel.is_idle():
            return
        self._end()
        try:
            self._spawn()
            reply = self._exchange(self._setup, self._setup.start_timeout_s, "was not loaded")
            if reply.traceback is not None:
                raise ChildFailed(str(reply.errors[0]), reply.traceback)
        except ChildFailed:
            self._end()
            raise

    def call(self, call: Call) -> Reply:
        """Scores a group, by a fresh process if there is none; a failure gives a reply too."""
        started = time.monotonic()
        try:
            self.start()
            started = time.monotonic()
            reply = self._exchange(call, self._setup.timeout_s, "gave no answer")
        except ChildFailed as failure:
            reply = Reply.failed(len(call.completions), failure.error, failure.traceback)
            self._end()
        return replace(reply, seconds=time.monotonic() - started)

    def close(self) -> None:
        """Ends the process and its descendants; a call under way fails."""
        with self._lock:
            if not self._closed:
                os.close(self._trace_fd)
            self._closed = True
        self._end()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._trace_fd)
        command = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *map(str, fds)]
        command += [sys.executable, "-m", "raygrpo.rewards.child"]
        with self._lock, theirs:
            self._channel = Channel(ours)
            if self._closed:
                raise ChildFailed(f"{self.name}: the scorer is closed")
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
                )
            except OSError as error:
                raise ChildFailed(f"{self.name}: no process could be started: {error}") from None

    def _exchange(self, message: Setup | Call, timeout_s: float, missed: str) -> Reply:
        """The child's reply; ``missed`` says what a child that is late did not do."""
        deadline = time.monotonic() + timeout_s
        channel = self._channel
        if channel is None:
            raise ChildFailed(f"{self.name}: the scorer is closed")
        try:
            channel.send(pickle.dumps(message), deadline)
            return REPLY.validate_json(channel.receive(deadline))
        except TimeoutError:
            error = f"{self.name}: {missed} within {timeout_s:g} s"
            stack = self._read_stack()
            raise ChildFailed(error, f"{error}; it was at\n{stack}" if stack else "") from None
        except (EOFError, OSError):
            end = self._describe_end()
            raise ChildFailed(f"{self.name}: its process ended {end}") from None
        except ValueError as broken:
            raise ChildFailed(f"{self.name}: its process broke the protocol: {broken}") from None

    def _read_stack(self) -> str:
        with self._lock:
            if self._closed:
                return ""
            return os.pread(self._trace_fd, MAX_STACK_BYTES, 0).decode(errors="replace")

    def _describe_end(self) -> str:
        process = self._process
        if process is None:
            return "because the scorer was closed"
        try:
            code = process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "its connection"
        number = code - 128 if code > 128 else -code
        if number in set(signal.Signals):
            return f"by {signal.Signals(number).name}"
        return f"with exit code {code}"

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
            channel, self._channel = self._channel, None
        if process is not None:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if channel is not None:
            channel.close()


class RewardHost:
    """All reward functions of one scorer; a context manager.

    Args:
        rewards: the configured rewards.
        functions: by reward name, the bytes (`pack_function`) of functions passed in Python.
        backends: by reward name, the backends of rewards without a child process.
        start_timeout_s: deadline of one function's import, in seconds.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSection],
        functions: Mapping[str, bytes],
        *,
        backends: Mapping[str, RewardBackend] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        names = [reward_name(reward) for reward in rewards]
        if len(set(names)) != len(names):
            raise ConfigError(f"rewards need distinct names, not {names}", "set rewards[].name")
        paths = tuple(str(Path(path).absolute()) for path in (*sys.path, ""))
        self._weights = {reward_name(reward): reward.weight for reward in rewards}
        # One thread a reward, which does its work in order.
        self._rewards: list[tuple[RewardBackend, ThreadPoolExecutor]] = []
        for reward, name in zip(rewards, names, strict=True):
            setup = Setup(
                name=name,
                func=reward.func,
                pickled=functions.get(name),
                params=reward.params,
                paths=paths,
                timeout_s=reward.timeout_s,
                start_timeout_s=start_timeout_s,
            )
            backend = (backends or {}).get(name) or RewardChild(setup)
            thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward-{name}")
            self._rewards.append((CachedReward(backend) if reward.cache else backend, thread))

    def start(self) -> None:
        """Starts all rewards and waits until their functions are loaded.

        Raises:
            RewardError: a function cannot be loaded, with its traceback; all children are ended.
        """
        starts = [thread.submit(backend.start) for backend, thread in self._rewards]
        failures = [error for start in starts if (error := start.exception()) is not None]
        if failures:
            self.close()
            raise failures[0]

    def score(self, group: Group, trainer_state: TrainerState) -> ScoredGroup:
        """Scores a group by all rewards at once; a failing reward is an errored score."""
        call = make_call(group, trainer_state)
        calls = [thread.submit(backend.call, call) for backend, thread in self._rewards]
        replies = {
            backend.name: answer.result()
            for (backend, _), answer in zip(self._rewards, calls, strict=True)
        }
        for backend, thread in self._rewards:
            if replies[backend.name].traceback is not None:
                # A fresh child warms up while the caller goes on; its next call tells a failure.
                with contextlib.suppress(RuntimeError):  # closed in the meantime
                    thread.submit(backend.start)
        return combine(replies, self._weights, len(group.completions))

    def close(self) -> None:
        """Ends all children and their descendants."""
        for backend, _ in self._rewards:
            backend.close()
        for _, thread in self._rewards:
            thread.shutdown()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def combine(replies: Mapping[str, Reply], weights: Mapping[str, float], size: int) -> ScoredGroup:
    """The scores [size]: weighted sums of the parts that are not None.

    A completion has no value if all its parts are None, or if one has an error. The metric
    ``rewards/{name}/error_frac`` is a reward's share of completions with an error.
    """
    metrics: dict[str, tuple[float, ...]] = defaultdict(tuple)
    extras: dict[str, tuple[Any, ...]] = {}
    for reward, reply in replies.items():
        errored = sum(error is not None for error in reply.errors)
        metrics[f"rewards/{reward}/error_frac"] = (errored / size,)
        for name, values in reply.metrics.items():
            metrics[name] += values
        extras |= reply.extras
    tracebacks = (reply.traceback for reply in replies.values() if reply.traceback)
    return ScoredGroup(
        scores=tuple(_score(replies, weights, index) for index in range(size)),
        metrics=dict(metrics),
        extras=extras,
        traceback=next(tracebacks, None),
        reward_s={name: reply.seconds for name, reply in replies.items()},
    )


def _score(replies: Mapping[str, Reply], weights: Mapping[str, float], index: int) -> Score:
    parts = {name: reply.parts[index] for name, reply in replies.items()}
    errors = [error for reply in replies.values() if (error := reply.errors[index]) is not None]
    weighted = [weights[name] * part for name, part in parts.items() if part is not None]
    if not errors and not math.isfinite(sum(weighted)):
        errors.append("the weighted sum is not finite")
    value = sum(weighted) if weighted and not errors else None
    return Score(value=value, parts=parts, error="; ".join(errors) if errors else None)
