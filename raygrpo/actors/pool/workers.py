"""What the rollout pool keeps of its workers and of the groups that are under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raygrpo.actors.futures import Pending
from raygrpo.actors.generator import GenerationReport, LoadReport
from raygrpo.actors.idle import IdleShare
from raygrpo.actors.scorer import ScoreReport
from raygrpo.algorithm.window import FinishedGroup
from raygrpo.types import GroupRequest, Stream

GroupKey = tuple[Stream, int]


@dataclass(eq=False, slots=True)
class Worker:
    """A process of the pool. ``starting`` is its call under way until it may get work.

    A reward model's ``living`` is a call that never returns: what resolves it is a death.
    ``asleep`` is a generator that has given its device to the learner until it loads again.
    ``joining`` is a generator that has yet to load what others hold; ``loading_publish`` is the
    number of the newest publish as its load under way began. A generator that is ``leaving`` gets
    nothing more, and is replaced once its groups are back. ``load`` adds up what it has: tokens at
    most in a generator, groups in others.
    """

    role: Role
    name: str
    actor: Any
    starting: Any = None
    loading: Any = None
    living: Any = None
    asleep: bool = False
    joining: bool = False
    leaving: str = ""
    loading_publish: int = 0
    deadline: float = 0.0
    pid: int = 0
    reward: str = ""
    groups: set[GroupKey] = field(default_factory=set)
    num_rows: int = 0
    load: int = 0
    idle: IdleShare = field(default_factory=IdleShare)

    @property
    def ready(self) -> bool:
        """Whether it may get groups."""
        # A generator that loads newer weights still decodes; only one that joins late must wait,
        # and the engine itself holds a request until it has the version that the request asks for.
        return self.starting is None and not self.joining and not self.leaving


@dataclass(eq=False, slots=True)
class Flight:
    """A group between submission and its scores.

    ``partials`` refers to what an aborted generator wrote of it, ``kept_tokens`` in all.
    """

    request: GroupRequest
    partials: Any = ()
    kept_tokens: int = 0
    worker: Worker | None = None
    share: tuple[int, int] = (0, 0)
    ref: Any = None
    payload: Any = None
    report: GenerationReport | None = None
    deadline: float = 0.0
    models: dict[str, Worker] = field(default_factory=dict)
    scorer_deaths: int = 0

    @property
    def num_rows(self) -> int:
        """Completions that a generator decodes at once."""
        return self.request.sampling.num_completions

    @property
    def max_tokens(self) -> int:
        """What is to be computed for it, at most."""
        sampling, prompt = self.request.sampling, self.request.prompt.token_ids
        return prompt.size + sampling.num_completions * sampling.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What one wait brought. ``lost`` groups must be sent again; ``dropped`` cannot be served.

    ``weights_lost``: the weight store has nothing any more, and must be given the weights again.
    ``aborted_tokens`` of training groups were written and are not gone on with.
    """

    groups: tuple[tuple[FinishedGroup, ScoreReport], ...] = ()
    lost: tuple[GroupKey, ...] = ()
    dropped: tuple[GroupKey, ...] = ()
    completed: tuple[Pending[Any], ...] = ()
    loads: tuple[LoadReport, ...] = ()
    events: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    weights_lost: bool = False
    aborted_tokens: int = 0


def least_loaded(workers: Sequence[Worker], rows: int, capacity: int, queue: int) -> Worker | None:
    """The ready worker with the least to do that takes ``rows`` more; None while there is none.

    A worker takes what it can do at once (``capacity``, or one group of any size). It takes as much
    again ahead, so as not to wait for the driver when places become free one by one, but only
    while the ``queue`` has a group for each other worker: what waits in a busy worker is lost to
    one that becomes idle.
    """
    ready = [worker for worker in workers if worker.ready]
    limit = 2 * capacity if queue >= len(ready) else capacity
    free = [w for w in ready if not w.num_rows or w.num_rows + rows <= limit]
    return min(free, key=lambda worker: worker.load, default=None)


def choose_models(models: Sequence[Worker], turn: int) -> dict[str, Worker] | None:
    """A started reward model for each reward, in turn; None while a reward has none."""
    chosen = {}
    for reward in {model.reward for model in models}:
        ready = [m for m in models if m.reward == reward and m.starting is None]
        if not ready:
            return None
        chosen[reward] = ready[turn % len(ready)]
    return chosen


Role = Literal["generator", "scorer", "reward_model", "learner", "store"]
