"""SIGTERM and SIGINT as an orderly stop: the first asks, a second one interrupts at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised in the main thread where a stop is asked for while nothing is under way to finish.

    A BaseException, as KeyboardInterrupt is: no handler of errors may take it for one.
    """


def _raise_stopped() -> None:
    raise Stopped("stopped by a signal")


class StopSignals:
    """What the first signal does: `Stopped` is raised, unless `during` says otherwise."""

    def __init__(self) -> None:
        self._action: Callable[[], None] = _raise_stopped
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the handlers over, again where another library replaced them; main thread only."""
        for number in _NUMBERS:
            with contextlib.suppress(ValueError):  # not the main thread: the caller's own business
                handler = signal.signal(number, self._handle)
                self._previous.setdefault(number, handler)

    def uninstall(self) -> None:
        """Gives the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Around what puts handlers of its own in place (Ray, whose handler exits): at the end they
        are these again, and a signal that came to the others is a `Stopped` all the same."""
        try:
            try:
                yield
            finally:
                self.install()
        except SystemExit as exited:
            if exited.code in _NUMBERS:
                raise Stopped("stopped by a signal") from None
            raise

    @contextlib.contextmanager
    def during(self, action: Callable[[], None]) -> Iterator[None]:
        """While this lasts, the first signal calls ``action`` and raises nothing."""
        before, self._action = self._action, action
        try:
            yield
        finally:
            self._action = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler)
        self._action()
