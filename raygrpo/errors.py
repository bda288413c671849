"""Typed errors. Each says what is wrong and what to do next, and survives pickling.

Libraries' errors become `InfraError`s by one table, `FOREIGN`.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final


class RayGrpoError(Exception):
    """Base of every error that raygrpo raises on purpose.

    Attributes:
        message: what went wrong, naming the thing.
        fix: the next step to take; empty where the message already says it.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class ConfigError(RayGrpoError):
    """The configuration, or what it points to, cannot work."""


class DataError(RayGrpoError):
    """A dataset, row or prompt cannot be used."""


class RewardError(RayGrpoError):
    """A reward function cannot be loaded, or fails too often."""


class NumericError(RayGrpoError):
    """A loss, gradient or weight is not finite."""


class InfraError(RayGrpoError):
    """A process, node or connection failed, or missed its deadline."""


class WorkerDied(InfraError):
    """The process that ran a call is gone."""


class AnswerLost(InfraError):
    """A call's answer was lost with the node that held it."""


class DependencyDied(InfraError):
    """A call failed because a process that it needs is gone; the called one is well."""


class EngineBroken(InfraError):
    """A generator's engine failed during a step, and serves nothing after it."""


class WeightsCorrupt(InfraError):
    """Other bytes arrived than were published."""


class WeightsLost(InfraError):
    """The weight store was restarted and is empty: the learner must publish again."""


class ProbeFailed(InfraError):
    """An engine computes other logprobs than the learner that published its weights.

    Attributes:
        figures: the version (incarnation, step), the gap and the tolerance, both in nats.
    """

    def __init__(self, version: tuple[int, int], gap: float, tolerance: float) -> None:
        super().__init__(
            f"version {tuple(version)} went in, but not in effect: the probe's logprobs differ by "
            f"{gap:.3g} from the learner's, more than {tolerance:.3g}"
        )
        self.figures = {"version": tuple(version), "gap": gap, "tolerance": tolerance}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.figures.values())


class StorageError(RayGrpoError):
    """A file of the run directory cannot be written, read or trusted."""


# Libraries' errors by name, since no process imports a library for its errors. The names of an
# error's class and of its bases are looked up in order. ``{what}`` is the failed work or process.
Table = Mapping[str, tuple[type[InfraError], str, str]]
FOREIGN: Final[Table] = {
    "ray.exceptions.RayActorError": (WorkerDied, "{what} died", ""),
    "ray.exceptions.WorkerCrashedError": (WorkerDied, "{what} died", ""),
    "ray.exceptions.NodeDiedError": (WorkerDied, "{what} died", ""),
    "ray.exceptions.OutOfMemoryError": (WorkerDied, "{what} died", ""),
    "ray.exceptions.ObjectLostError": (AnswerLost, "the answer of {what} was lost", ""),
    "ray.exceptions.GetTimeoutError": (AnswerLost, "the answer of {what} was lost", ""),
    "ray.exceptions.RayError": (InfraError, "Ray could not run {what}", ""),
    "torch.OutOfMemoryError": (
        InfraError,
        "{what} ran out of GPU memory",
        "lower train.tokens_per_microbatch or generators.max_rows, or raise the ZeRO stage",
    ),
    "torch.AcceleratorError": (InfraError, "{what} lost its device", "see the log of its process"),
    "vllm.exceptions.VLLMServerError": (InfraError, "{what} failed", "the generator is replaced"),
}
# The same for an error that was raised inside a remote call: there, Ray's errors are about others.
FOREIGN_INSIDE: Final[Table] = {
    "ray.exceptions.ObjectLostError": (AnswerLost, "{what} lost its input", ""),
    "ray.exceptions.RayError": (DependencyDied, "{what} lost a process that it needs", ""),
    **{name: row for name, row in FOREIGN.items() if name.startswith("torch.")},
}


def infra_error(error: BaseException, what: str, table: Table = FOREIGN) -> InfraError | None:
    """The InfraError for a library's error; None for an error that is not in the table."""
    for cls in type(error).__mro__:
        if row := table.get(f"{cls.__module__}.{cls.__qualname__}"):
            kind, message, fix = row
            return kind(f"{message.format(what=what)}: {first_line(error)}", fix)
    return None


@contextmanager
def infra_errors(
    what: str, table: Table = FOREIGN, *, all_errors: bool = False, fix: str = ""
) -> Iterator[None]:
    """Raises libraries' errors as InfraErrors; with ``all_errors`` every error but our own.

    ``what`` names the process or the work, for example ``"a load"``; ``fix`` is the next step for
    errors outside the table.
    """
    try:
        yield
    except RayGrpoError:
        raise
    except Exception as error:
        known = infra_error(error, what, table)
        if all_errors and known is None:
            traceback.print_exc()
            known = InfraError(f"{what} failed: {type(error).__name__}: {first_line(error)}", fix)
        if known is None:
            raise
        raise known from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(word: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: the known one that is most like it, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
