"""Libraries' errors become ours: as a call's own failure, and as what a call raised."""

from __future__ import annotations

import pytest
import ray.exceptions
import torch

from raygrpo.actors import futures
from raygrpo.actors.futures import resolve
from raygrpo.errors import (
    FOREIGN_INSIDE,
    AnswerLost,
    DataError,
    DependencyDied,
    InfraError,
    WeightsLost,
    WorkerDied,
    infra_errors,
)

LOST = ray.exceptions.ObjectLostError("00" * 28, None, "")


class Ray:
    """A Ray whose calls have all failed in one way."""

    exceptions = ray.exceptions

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def get(self, ref: object, timeout: float) -> object:
        raise self._error


def raised_inside(error: BaseException) -> BaseException:
    """The error of a call, as Ray hands it on."""
    task_error = ray.exceptions.RayTaskError("generate", "remote traceback", error)
    return task_error.as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ray.exceptions.RayActorError(), WorkerDied, "generator-0 died"),
        (ray.exceptions.NodeDiedError("gone"), WorkerDied, "generator-0 died: gone"),
        (ray.exceptions.OutOfMemoryError("killed"), WorkerDied, "died: killed"),
        (LOST, AnswerLost, "the answer of generator-0 was lost"),
        (ray.exceptions.GetTimeoutError("late"), AnswerLost, "was lost: late"),
        (ray.exceptions.RaySystemError("odd"), InfraError, "Ray could not run generator-0"),
        (raised_inside(DataError("too long")), DataError, "too long"),
        (raised_inside(WorkerDied("the scorer died")), WorkerDied, "the scorer died"),
        (raised_inside(LOST), AnswerLost, "generator-0 lost its input"),
        (raised_inside(ray.exceptions.RayActorError()), DependencyDied, "process that it needs"),
        (raised_inside(torch.OutOfMemoryError("4 GiB")), InfraError, "GPU memory: 4 GiB"),
        (raised_inside(KeyError("bug")), KeyError, "remote traceback"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_failure_of_a_call_has_its_type(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type[Exception], message: str
) -> None:
    monkeypatch.setattr(futures, "ray", Ray(error))
    with pytest.raises(kind) as found:
        resolve("ref", "generator-0")
    assert message in str(found.value)
    assert isinstance(found.value, InfraError) or not issubclass(kind, InfraError)


def test_work_may_make_every_error_but_our_own_one_of_infrastructure() -> None:
    def load(error: Exception, *, all_errors: bool = True) -> None:
        with infra_errors("a load", FOREIGN_INSIDE, all_errors=all_errors, fix="wait"):
            raise error

    with pytest.raises(InfraError, match="a load failed: OSError: no memory\n  fix: wait"):
        load(OSError("no memory"))
    with pytest.raises(DependencyDied, match="a load lost a process that it needs"):
        load(ray.exceptions.RayActorError())
    with pytest.raises(WeightsLost):
        load(WeightsLost("empty"))
    with pytest.raises(OSError, match="no memory"):
        load(OSError("no memory"), all_errors=False)
