"""Results that are on their way: named, with a deadline, and with errors in the project's terms."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions

from raygrpo.errors import FOREIGN_INSIDE, InfraError, RayGrpoError, infra_error

T = TypeVar("T")
Handle = Any  # of a Ray actor, whose methods are called by ``.remote(...)``


def resolve(ref: Any, what: str, timeout_s: float = 60.0) -> Any:
    """The value of a call, which has finished or finishes within ``timeout_s``.

    Raises:
        WorkerDied, AnswerLost: the process or its answer is gone.
        RayGrpoError: what the call raised on purpose; anything else is raised as it was.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:  # first: it is of its cause's class too
        cause = error.cause
        if isinstance(cause, RayGrpoError):
            raise cause from None
        # A bug is passed on with its remote traceback.
        raise infra_error(cause, what, FOREIGN_INSIDE) or error from None
    except ray.exceptions.RayError as error:
        raise infra_error(error, what) or error from None


class Pending(Generic[T]):
    """One result of several calls (say, one a rank), finished when all are, failed when one is."""

    def __init__(
        self, name: str, refs: Sequence[Any], timeout_s: float, combine: Callable[[list[Any]], T]
    ) -> None:
        self.name = name
        self.refs = list(refs)
        self.started = time.monotonic()
        self.seconds = 0.0
        self._deadline = self.started + timeout_s
        self._timeout_s = timeout_s
        self._combine = combine
        self._values: dict[Any, Any] = {}

    @property
    def open_refs(self) -> list[Any]:
        """Calls that have not answered."""
        return [ref for ref in self.refs if ref not in self._values]

    def collect(self, ready: set[Any]) -> bool:
        """Takes what is ready; returns whether all is there. Raises what a call raised."""
        for ref in self.open_refs:
            if ref in ready:
                self._values[ref] = resolve(ref, self.name)
        if not self.open_refs:
            self.seconds = time.monotonic() - self.started
            return True
        if time.monotonic() > self._deadline:
            raise InfraError(
                f"{self.name} took longer than {self._timeout_s:g} s",
                "see logs/ for what it was doing, or raise the deadline in the ray section",
            )
        return False

    @property
    def value(self) -> T:
        """The combined result; only once `collect` returned True."""
        return self._combine([self._values[ref] for ref in self.refs])

    def wait(self) -> T:
        """Blocks until the result is there."""
        while True:
            left = max(0.0, self._deadline - time.monotonic())
            ready, _ = ray.wait(self.open_refs, num_returns=1, timeout=min(left, 1.0))
            if self.collect(set(ready)):
                return self.value
