"""Results that are on their way: named, with a deadline, and with errors in the project's terms."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions

from raygrpo.errors import InfraError, RayGrpoError

T = TypeVar("T")

_DEAD = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)


class WorkerDied(InfraError):
    """The process that ran a call is gone."""


class AnswerLost(InfraError):
    """A call's answer was lost with the node that held it."""


class DependencyDied(InfraError):
    """A call failed because a process that it needs is gone; the called one is well."""


def resolve(ref: Any, what: str, timeout_s: float = 60.0) -> Any:
    """The value of a call, which has finished or finishes within ``timeout_s``.

    Raises:
        WorkerDied, AnswerLost: the process or its answer is gone.
        RayGrpoError: what the call raised on purpose; anything else is raised as it was.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:  # first: it is of its cause's class too
        raise _raised_inside(error, what) from None
    except _DEAD as error:
        raise WorkerDied(f"{what} died: {_first_line(error)}") from None
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError) as error:
        raise AnswerLost(f"the answer of {what} was lost: {_first_line(error)}") from None
    except ray.exceptions.RayError as error:
        raise InfraError(f"Ray could not run {what}: {_first_line(error)}") from None


def _raised_inside(error: Any, what: str) -> BaseException:
    """What a call raised, in the project's terms; a bug is passed on with its remote traceback."""
    cause = error.cause
    if isinstance(cause, RayGrpoError):
        return cause
    if isinstance(cause, ray.exceptions.ObjectLostError):
        return AnswerLost(f"{what} lost its input: {_first_line(cause)}")
    if isinstance(cause, ray.exceptions.RayError):
        return DependencyDied(f"{what} lost a process that it needs: {_first_line(cause)}")
    if type(cause).__name__ == "OutOfMemoryError":  # torch's; this module does without torch
        return InfraError(
            f"{what} ran out of GPU memory: {_first_line(cause)}",
            "lower train.tokens_per_microbatch or generators.max_rows, or raise the ZeRO stage",
        )
    bug: BaseException = error
    return bug


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Pending(Generic[T]):
    """One result of several calls (say, one a rank), finished when all are, failed when one is."""

    def __init__(
        self,
        name: str,
        refs: Sequence[Any],
        timeout_s: float,
        combine: Callable[[list[Any]], T],
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
