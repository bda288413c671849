"""The scorer's side of rewards: a child process for each, and the sum of their values."""

from __future__ import annotations

import contextlib
import json
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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
from raygrpo.rewards.loading import anchor_reward
from raygrpo.rewards.wire import Channel
from raygrpo.types import Group, Score

GUARD = Path(__file__).with_name("guard.py")
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
MAX_STACK_BYTES = 1 << 16


class _ChildFailed(Exception):
    """A child missed a deadline, died, or could not load its function."""

    def __init__(self, error: str, traceback: str) -> None:
        super().__init__(error)
        self.error = error
        self.traceback = traceback


class RewardChild:
    """One reward function in a process of its own; a failing process is ended with its descendants.

    One thread of the host does its work in order, so a fresh child warms up while callers go on.
    """

    def __init__(self, setup: Setup) -> None:
        self.name = setup.name
        self._setup = pickle.dumps(setup)
        self._timeout_s = setup.timeout_s
        self._start_timeout_s = setup.start_timeout_s
        # Where the child leaves its stack when a deadline is near: shared memory outlives it.
        self._trace_fd = os.memfd_create("reward-stack")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward-{setup.name}")
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None

    def start(self) -> Future[None]:
        """Starts the process and loads the function."""
        return self._thread.submit(self._warm)

    def call(self, call: Call) -> Future[tuple[Reply, float]]:
        """Scores a group; the reply and its seconds.

        A failure gives a reply too, and the next call meets a fresh process.
        """
        return self._thread.submit(self._answer, pickle.dumps(call), len(call.completions))

    def close(self) -> None:
        """Ends the process and its descendants; a call under way fails."""
        with self._lock:
            self._closed = True
        self._end()
        self._thread.shutdown()
        if self._trace_fd >= 0:
            os.close(self._trace_fd)
            self._trace_fd = -1

    def _answer(self, request: bytes, size: int) -> tuple[Reply, float]:
        started = time.monotonic()
        try:
            channel = self._channel
            if channel is None or not channel.is_idle():  # never started, or died between calls
                self._warm()
                started = time.monotonic()
            message = self._exchange(request, started + self._timeout_s)
            reply = _read_reply(message, size)
        except _ChildFailed as failure:
            reply = Reply.failed(size, failure.error, failure.traceback)
            self._end()
            with contextlib.suppress(RuntimeError):  # closed in the meantime
                self._thread.submit(self._warm_quietly)
        return reply, time.monotonic() - started

    def _warm_quietly(self) -> None:
        # A call that finds no process warms one up again, and reports why that fails.
        with contextlib.suppress(_ChildFailed):
            self._warm()

    def _warm(self) -> None:
        self._end()
        deadline = time.monotonic() + self._start_timeout_s
        self._spawn()
        try:
            message = self._exchange(self._setup, deadline)
            if "error" in message:
                raise _ChildFailed(message["error"], message["traceback"])
        except _ChildFailed:
            self._end()
            raise

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._trace_fd)
        command = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *map(str, fds)]
        command += [sys.executable, "-m", "raygrpo.rewards.child"]
        with self._lock, theirs:
            if self._closed:
                ours.close()
                raise _ChildFailed(f"{self.name}: the scorer is closed", "")
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
                )
            except OSError as error:
                ours.close()
                raise _ChildFailed(
                    f"{self.name}: no process could be started: {error}", ""
                ) from None
            self._channel = Channel(ours)

    def _exchange(self, request: bytes, deadline: float) -> Mapping[str, Any]:
        channel = self._channel
        if channel is None:
            raise _ChildFailed(f"{self.name}: the scorer is closed", "")
        try:
            channel.send(request, deadline)
            message: Mapping[str, Any] = json.loads(channel.receive(deadline))
        except TimeoutError:
            limit = self._start_timeout_s if request is self._setup else self._timeout_s
            doing = "was not loaded" if request is self._setup else "gave no answer"
            error = f"{self.name}: {doing} within {limit:g} s"
            stack = os.pread(self._trace_fd, MAX_STACK_BYTES, 0).decode(errors="replace")
            raise _ChildFailed(error, f"{error}; it was at\n{stack}" if stack else error) from None
        except (EOFError, OSError):
            error = f"{self.name}: its process ended {self._describe_end()}"
            raise _ChildFailed(error, error) from None
        except ValueError as broken:
            error = f"{self.name}: its process broke the protocol: {broken}"
            raise _ChildFailed(error, error) from None
        return message

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


def _read_reply(message: Mapping[str, Any], size: int) -> Reply:
    if "error" in message:
        return Reply.failed(size, message["error"], message["traceback"])
    return Reply(
        parts=tuple(message["parts"]),
        errors=tuple(message["errors"]),
        metrics={name: tuple(values) for name, values in message["metrics"].items()},
        extras={name: tuple(values) for name, values in message["extras"].items()},
    )


class RewardHost:
    """All reward functions of one scorer; a context manager.

    Args:
        rewards: the configured rewards; a relative file starts from ``directory``.
        functions: by reward name, the bytes (`pack_function`) of functions passed in Python.
        backends: by reward name, the backends of rewards without a child process.
        directory: the place of relative files and modules; None: the current directory.
        start_timeout_s: deadline of one function's import, in seconds.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSection],
        functions: Mapping[str, bytes],
        *,
        backends: Mapping[str, RewardBackend] | None = None,
        directory: Path | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        names = [reward_name(reward) for reward in rewards]
        if len(set(names)) != len(names):
            raise ConfigError(f"rewards need distinct names, not {names}", "set rewards[].name")
        here = (directory or Path.cwd()).absolute()
        paths = (*(str(Path(path).absolute()) for path in sys.path), str(here))
        self._weights = {reward_name(reward): reward.weight for reward in rewards}
        self._backends: list[RewardBackend] = []
        for reward, name in zip(rewards, names, strict=True):
            setup = Setup(
                name=name,
                func=anchor_reward(reward, here).func,
                pickled=functions.get(name),
                params=reward.params,
                paths=paths,
                timeout_s=reward.timeout_s,
                start_timeout_s=start_timeout_s,
            )
            backend = (backends or {}).get(name) or RewardChild(setup)
            self._backends.append(CachedReward(backend) if reward.cache else backend)

    def start(self) -> None:
        """Starts all rewards and waits until their functions are loaded.

        Raises:
            RewardError: a function cannot be loaded, with its traceback; all children are ended.
        """
        starts = [backend.start() for backend in self._backends]
        failures = [error for start in starts if (error := start.exception()) is not None]
        if not failures:
            return
        self.close()
        first = failures[0]
        if not isinstance(first, _ChildFailed):
            raise first
        raise RewardError(f"{first.error}\n{first.traceback}".rstrip())

    def score(self, group: Group, trainer_state: TrainerState) -> ScoredGroup:
        """Scores a group by all rewards at once; a failing reward is an errored score."""
        call = make_call(group, trainer_state)
        calls = {backend.name: backend.call(call) for backend in self._backends}
        answers = {name: answer.result() for name, answer in calls.items()}
        return combine(
            {name: reply for name, (reply, _) in answers.items()},
            self._weights,
            {name: seconds for name, (_, seconds) in answers.items()},
            len(group.completions),
        )

    def close(self) -> None:
        """Ends all children and their descendants."""
        for backend in self._backends:
            backend.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def combine(
    replies: Mapping[str, Reply],
    weights: Mapping[str, float],
    reward_s: Mapping[str, float],
    size: int,
) -> ScoredGroup:
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
        reward_s=reward_s,
    )


def _score(replies: Mapping[str, Reply], weights: Mapping[str, float], index: int) -> Score:
    parts = {name: reply.parts[index] for name, reply in replies.items()}
    errors = [error for reply in replies.values() if (error := reply.errors[index]) is not None]
    weighted = [weights[name] * part for name, part in parts.items() if part is not None]
    if not errors and not math.isfinite(sum(weighted)):
        errors.append("the weighted sum is not finite")
    value = sum(weighted) if weighted and not errors else None
    return Score(value=value, parts=parts, error="; ".join(errors) if errors else None)
