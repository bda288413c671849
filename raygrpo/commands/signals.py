"""SIGTERM and SIGINT as an orderly stop: the first asks, a second one interrupts at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised in the main thread by a signal while there is nothing to finish.

    A BaseException, like KeyboardInterrupt: no handler of errors may catch it.
    """


def _raise_stopped() -> None:
    raise Stopped("stopped by a signal")


class StopSignals:
    """Handlers of SIGTERM and SIGINT: the first signal raises `Stopped`, or calls an action."""

    def __init__(self) -> None:
        self._action: Callable[[], None] = _raise_stopped
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Puts the handlers in place, again where another library replaced them."""
        for number in _NUMBERS:
            with contextlib.suppress(ValueError):  # outside the main thread the caller decides
                handler = signal.signal(number, self._handle)
                self._previous.setdefault(number, handler)

    def uninstall(self) -> None:
        """Gives the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Around a call that installs handlers of its own, such as `ray.init`, whose handler exits.

        At the end these handlers are in place again. A signal that came to the other handlers
        raises `Stopped` here.
        """
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
        """Inside the block the first signal calls ``action`` and raises nothing."""
        before, self._action = self._action, action
        try:
            yield
        finally:
            self._action = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler)
        self._action()
