"""Traces of one step by torch's profiler, in the learner and in a generator."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygrpo.engines.base import Engine
from raygrpo.errors import ConfigError
from raygrpo.types import Group, GroupRequest

_MAX_ENGINE_STEPS = 200  # a trace holds some 0.1 MB an engine step and must open in a browser
_TABLE_ROWS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRequest:
    """An order to trace ``step`` (the one that makes version ``step``) into ``directory``.

    A node that does not share the run directory lacks the directory, and writes nothing.
    """

    step: int
    directory: Path

    def path(self, name: str) -> Path:
        """The path of a process's trace; a file appears there when it is whole."""
        return self.directory / f"{name}.json.gz"


def order_profile(root: Path, step: int, *, done: int, steps: int) -> ProfileRequest:
    """An order for a run directory in which ``done`` of ``steps`` steps are trained.

    Raises:
        ConfigError: ``step`` is trained already, or after the last one.
    """
    if not done < step <= steps:
        raise ConfigError(
            f"no step {step} to profile: this run has {steps} steps, {done} of them trained",
            f"name one of the steps from {done + 1} to {steps}" if done < steps else "",
        )
    directory = root / "profile" / f"step-{step}"
    directory.mkdir(parents=True, exist_ok=True)
    return ProfileRequest(step=step, directory=directory)


class Tracer:
    """Records the calling thread's work inside the ``with`` block, once.

    Writes NAME.json.gz (Chrome's trace format) and NAME.txt (time by operator). A failure of the
    profiler is printed, so that a trace never costs a step.
    """

    def __init__(self, request: ProfileRequest, name: str) -> None:
        self._request = request
        self._name = name
        self._profile: Any = None

    def __enter__(self) -> None:
        import torch

        if not self._request.directory.is_dir():
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, acc_events=True)
        with _printed():
            self._profile.start()

    def __exit__(self, *exc_info: object) -> None:
        if self._profile is None:
            return
        with _printed():
            self._profile.stop()
            self._write()

    def _write(self) -> None:
        path = self._request.path(self._name)
        on_gpu = len(self._profile.activities) > 1
        table = self._profile.key_averages().table(
            sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total",
            row_limit=_TABLE_ROWS,
        )
        path.with_name(f"{self._name}.txt").write_text(table)
        temporary = path.with_name(f".{self._name}.tmp.gz")
        self._profile.export_chrome_trace(str(temporary))
        temporary.replace(path)


class EngineTracer:
    """Traces an engine from a step's first request until nothing is left, or for 200 steps.

    A request belongs to step N if it asks for version N - 1. All calls come from the engine's own
    thread.
    """

    def __init__(self, engine: Engine, request: ProfileRequest, name: str) -> None:
        self._engine = engine
        self._step = request.step
        self._tracer = Tracer(request, name)
        self._left = _MAX_ENGINE_STEPS
        self._open = contextlib.ExitStack()
        self._begun = False

    def submit(self, request: GroupRequest) -> None:
        """`Engine.submit`, after which tracing may begin."""
        self._engine.submit(request)
        due = request.stream == "train" and request.min_version.step >= self._step - 1
        if due and not self._begun:
            self._begun = True
            self._open.enter_context(self._tracer)

    def step(self) -> list[Group]:
        """`Engine.step`, after which tracing may end."""
        groups = self._engine.step()
        if self._begun and self._left:
            self._left = self._left - 1 if self._engine.can_step else 0
            if not self._left:
                self._open.close()
        return groups


@contextlib.contextmanager
def _printed() -> Any:
    try:
        yield
    except (OSError, RuntimeError) as error:
        print(f"no profile: {type(error).__name__}: {error}", flush=True)
