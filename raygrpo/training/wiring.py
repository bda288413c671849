"""What a trainer drives, as Protocols: a test may give it parts without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raygrpo.actors.futures import Handle, Pending
from raygrpo.actors.pool.workers import PoolEvents
from raygrpo.config import RunConfig
from raygrpo.data.prompts import PromptStream
from raygrpo.rewards.contract import TrainerState
from raygrpo.storage.checkpoint import Checkpoints
from raygrpo.storage.rollouts import Kind
from raygrpo.storage.run_dir import RunDir
from raygrpo.types import (
    FinishedGroup,
    GroupRequest,
    Prompt,
    StepBatch,
    StepResult,
    Stream,
    Version,
)
from raygrpo.weights.types import PublishReport


class Pool(Protocol):
    """Generators and scorers; see `RolloutPool`."""

    @property
    def normal_gap(self) -> float | None: ...
    def submit(self, request: GroupRequest) -> None: ...
    def forget(self, stream: Stream) -> None: ...
    def load(self, broken: Mapping[str, str] = ...) -> None: ...
    def sleep(self) -> bool: ...
    def receivers(self) -> Mapping[str, Handle]: ...
    def take_idle_frac(self) -> float | None: ...
    def wait(
        self, pendings: Sequence[Pending[Any]], timeout_s: float, trainer_state: TrainerState
    ) -> PoolEvents: ...


class Learner(Protocol):
    """The learner's ranks; see `LearnerGroup`."""

    def update(self, batch: StepBatch, incarnation: int) -> Pending[StepResult]: ...
    def publish(
        self, version: Version, generators: Mapping[str, Handle]
    ) -> Pending[PublishReport]: ...
    def save(self, directory: Path) -> Pending[None]: ...


class Rollouts(Protocol):
    """The rollout store's writer; see `RolloutLog`."""

    @property
    def pendings(self) -> list[Pending[Any]]: ...
    @property
    def has_room(self) -> bool: ...
    def settled(self, step: int) -> bool: ...
    def take(self, decided: Iterable[FinishedGroup]) -> None: ...
    def write_step(self, batch: StepBatch) -> None: ...
    def write_rest(self, kind: Kind, step: int) -> None: ...
    def confirm(self, pending: Pending[Any]) -> None: ...
    def metrics(self) -> dict[str, float]: ...


class Tracker(Protocol):
    """Where metrics and events go; see `tracking.tracker.Tracker`."""

    def event(self, kind: str, /, **fields: Any) -> None: ...
    def log_step(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """The parts of a run, wired up. ``incarnation`` counts the learner's starts."""

    config: RunConfig
    pool: Pool
    learner: Learner
    prompts: PromptStream
    eval_prompts: Sequence[Prompt]
    tracker: Tracker
    rollouts: Rollouts
    run_dir: RunDir
    checkpoints: Checkpoints
    incarnation: int
