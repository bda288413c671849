"""Typed errors. Each says what is wrong and what to do next, and survives pickling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


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


class EngineBroken(InfraError):
    """A generator's engine failed in the midst of its work, and serves nothing any more."""


class WeightsCorrupt(InfraError):
    """Weights that arrived are not those that were published."""


class WeightsLost(InfraError):
    """The weight store was restarted, and has nothing: the learner must publish again."""


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


def nearest(word: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: the known one that is most like it, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
