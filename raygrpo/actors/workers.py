"""What the rollout pool keeps of its workers and of the groups that are under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raygrpo.actors.futures import Pending
from raygrpo.actors.generator import GenerationReport, LoadReport
from raygrpo.actors.scorer import ScoreReport
from raygrpo.algorithm.window import FinishedGroup
from raygrpo.failures import Role
from raygrpo.types import GroupRequest, Stream

GroupKey = tuple[Stream, int]


@dataclass(eq=False, slots=True)
class Worker:
    """A process of the pool. ``starting`` is its call under way until it may get work.

    A reward model's ``living`` is a call that never returns: what resolves it is a death.
    ``joining`` is a generator that has yet to load what others hold; ``loading_publish`` is the
    number of the newest publish as its load under way began.
    """

    role: Role
    name: str
    actor: Any
    starting: Any = None
    loading: Any = None
    living: Any = None
    joining: bool = False
    loading_publish: int = 0
    deadline: float = 0.0
    pid: int = 0
    reward: str = ""
    groups: set[GroupKey] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Flight:
    """A group between submission and its scores."""

    request: GroupRequest
    worker: Worker | None = None
    ref: Any = None
    payload: Any = None
    report: GenerationReport | None = None
    deadline: float = 0.0
    models: dict[str, Worker] = field(default_factory=dict)
    scorer_deaths: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What one wait brought. ``lost`` groups must be sent again; ``dropped`` cannot be served.

    ``weights_lost``: the weight store has nothing any more, and must be given the weights again.
    """

    groups: tuple[tuple[FinishedGroup, ScoreReport], ...] = ()
    lost: tuple[GroupKey, ...] = ()
    dropped: tuple[GroupKey, ...] = ()
    completed: tuple[Pending[Any], ...] = ()
    loads: tuple[LoadReport, ...] = ()
    events: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    weights_lost: bool = False


def least_loaded(workers: Sequence[Worker]) -> Worker | None:
    """The started worker with the fewest groups; None while none has started."""
    # A generator that loads newer weights still decodes; only one that joins late must wait, and
    # the engine itself holds a request until it has the version that the request asks for.
    ready = [worker for worker in workers if worker.starting is None and not worker.joining]
    return min(ready, key=lambda worker: len(worker.groups), default=None)


def choose_models(models: Sequence[Worker], turn: int) -> dict[str, Worker] | None:
    """A started reward model for each reward, in turn; None while a reward has none."""
    chosen = {}
    for reward in {model.reward for model in models}:
        ready = [m for m in models if m.reward == reward and m.starting is None]
        if not ready:
            return None
        chosen[reward] = ready[turn % len(ready)]
    return chosen
