"""The child process of one reward function: loads it, then answers calls in its main thread.

``python -m raygrpo.rewards.child FD TRACE_FD GUARD_PID``, run by `guard`. Requests come pickled;
replies are JSON, so that the host unpickles nothing that user code has made.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import faulthandler
import json
import math
import os
import pickle
import signal
import socket
import sys
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Iterator
from dataclasses import asdict
from typing import Any

from raygrpo.rewards.contract import Call, Reply, Setup
from raygrpo.rewards.loading import accepted_arguments, load_reward
from raygrpo.rewards.values import MAX_ERROR_CHARS, clean, number, read_values
from raygrpo.rewards.wire import Channel

PR_SET_PDEATHSIG = 1


# Share of a deadline after which the stack is kept, for the host to read once it has passed.
TRACE_FRAC = 0.9


def main(fd: int, trace_fd: int, guard_pid: int) -> None:
    """Serves until the host closes the connection."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guard_pid:
        return
    for own in (fd, trace_fd):
        os.set_inheritable(own, False)
    channel = Channel(socket.socket(fileno=fd))
    with contextlib.suppress(EOFError, ConnectionError):
        setup: Setup = pickle.loads(channel.receive(None))
        sys.path += [path for path in setup.paths if path not in sys.path]
        with _keeping_stack(trace_fd, setup.start_timeout_s):
            try:
                reward = ServedReward(setup)
            except BaseException as error:  # the user's module may raise anything, SystemExit too
                return _send(channel, _failure(setup.name, 1, "cannot be loaded", error))
        _send(channel, Reply(parts=(), errors=()))
        while True:
            call: Call = pickle.loads(channel.receive(None))
            with _keeping_stack(trace_fd, setup.timeout_s):
                reply = reward.answer(call)
            _send(channel, reply)


@contextlib.contextmanager
def _keeping_stack(trace_fd: int, timeout_s: float) -> Iterator[None]:
    """Writes the stack shortly before the deadline, from a thread that needs no interpreter."""
    os.ftruncate(trace_fd, 0)
    os.lseek(trace_fd, 0, os.SEEK_SET)
    faulthandler.dump_traceback_later(TRACE_FRAC * timeout_s, file=trace_fd)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _send(channel: Channel, reply: Reply) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send(json.dumps(asdict(reply)).encode(), None)


class ServedReward:
    """A loaded reward function and how to call it."""

    def __init__(self, setup: Setup) -> None:
        self._name = setup.name
        self._function, self._params = load_reward(setup)
        self._accepted = accepted_arguments(self._function)
        self._runner = asyncio.Runner()
        self._pid = os.getpid()

    def answer(self, call: Call) -> Reply:
        """The reply to one call."""
        size, reports = len(call.completions), Reports()
        try:
            parts, errors = read_values(self._name, self._call(call, reports), size)
        except BaseException as error:  # user code may raise anything, SystemExit included
            if os.getpid() == self._pid:
                return _failure(self._name, size, "raised", error)
        finally:
            # A process that the function forked, and which came back here, is not the child.
            if os.getpid() != self._pid:
                os._exit(1)
        metrics, extras = reports.read(size)
        return Reply(parts=tuple(parts), errors=tuple(errors), metrics=metrics, extras=extras)

    def _call(self, call: Call, reports: Reports) -> Any:
        size = len(call.completions)
        arguments: dict[str, Any] = {
            **{name: _repeat(value, size) for name, value in call.columns.items()},
            "prompts": _repeat(call.prompt, size),
            "completions": list(call.completions),
            "completion_ids": list(call.completion_ids),
            "trainer_state": call.trainer_state,
            "log_extra": reports.log_extra,
            "log_metric": reports.log_metric,
            **self._params,
        }
        if self._accepted is not None:
            arguments = {k: v for k, v in arguments.items() if k in self._accepted}
        values = self._function(**arguments)
        # One event loop for all calls: clients that an async function keeps are bound to theirs.
        return self._runner.run(_wait(values)) if isinstance(values, Awaitable) else values


class Reports:
    """What a reward function logs during one call."""

    def __init__(self) -> None:
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._extras: dict[str, list[Any]] = defaultdict(list)

    def log_metric(self, name: str, value: float) -> None:
        """Reports a value; a metric is the mean of its values over a step."""
        self._metrics[str(name)].append(number(value))

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Adds values to a column beside the completions."""
        self._extras[str(column)].extend(_plain(value) for value in values)

    def read(self, size: int) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[Any, ...]]]:
        """Finite metrics, and columns of the group's size; all others are named on stderr."""
        finite = {k: tuple(filter(math.isfinite, v)) for k, v in self._metrics.items()}
        metrics = {name: values for name, values in finite.items() if values}
        extras = {k: tuple(v) for k, v in self._extras.items() if len(v) == size}
        for name in (self._metrics.keys() - metrics) | (self._extras.keys() - extras):
            print(f"log of {name!r} left out: not finite, or not {size} values", file=sys.stderr)
        return metrics, extras


async def _wait(values: Awaitable[Any]) -> Any:
    return await values


def _repeat(value: Any, size: int) -> list[Any]:
    """``size`` copies: a function that changes one completion's row changes no other row."""
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return [value] * size
    return [copy.deepcopy(value) for _ in range(size)]


def _plain(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return clean(value if isinstance(value, str) else repr(value))


def _failure(name: str, size: int, what: str, error: BaseException) -> Reply:
    last = traceback.format_exception_only(error)[-1].strip()
    return Reply.failed(
        size,
        clean(f"{name}: {what}: {last}")[:MAX_ERROR_CHARS],
        clean("".join(traceback.format_exception(error))),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
