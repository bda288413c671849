"""The rollout pool's records: its workers, the groups under way, and what a wait brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raygrpo.actors.futures import Handle, Pending
from raygrpo.actors.generator import GenerationReport
from raygrpo.actors.idle import IdleShare
from raygrpo.actors.weight_sync import LoadReport
from raygrpo.types import FinishedGroup, GroupRequest, Ref, Stream

GroupKey = tuple[Stream, int]
Role = Literal["generator", "scorer", "reward_model"]


@dataclass(eq=False, slots=True)
class Worker:
    """A process of the pool. Example: Worker("generator", "generator-0", handle).

    ``starting``, ``loading`` and ``living`` refer to calls under way: the start, a load of weights,
    and a reward model's call that never returns (only the model's death ends the call). A generator
    is ``asleep`` while the learner has its device, and ``joining`` until it holds the weights that
    the others hold. ``loading_publish`` counts the publishes up to the one that the load under way
    began with. A generator that is ``leaving`` (the reason) gets no more groups, and is replaced
    once its groups are back. ``load`` is the work of its groups: their tokens at most in a
    generator, their number in other workers.
    """

    role: Role
    name: str
    actor: Handle
    starting: Ref = None
    loading: Ref = None
    living: Ref = None
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
        # A generator that loads newer weights still decodes, so it may get groups. The engine holds
        # a request back until the engine has the version that the request asks for.
        return self.starting is None and not self.joining and not self.leaving

    @property
    def can_receive(self) -> bool:
        """Whether a generator may be sent a version directly."""
        return self.ready and self.loading is None and not self.asleep

    @property
    def process(self) -> str:
        """A name that no replacement has, such as ``generator-0/4711``."""
        return f"{self.name}/{self.pid}"


@dataclass(eq=False, slots=True)
class Flight:
    """A group between submission and its scores.

    ``partials`` refers to what a generator that left wrote of the group: ``kept_tokens`` tokens.
    ``ref`` is the call under way of ``worker``, which counts ``share`` (rows, load) for the group.
    ``payload`` refers to the generated `Group`, whose ``report`` has come.
    """

    request: GroupRequest
    partials: Ref = ()
    kept_tokens: int = 0
    worker: Worker | None = None
    share: tuple[int, int] = (0, 0)
    ref: Ref = None
    payload: Ref = None
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
        """The tokens that a generator computes for the group, at most."""
        sampling, prompt = self.request.sampling, self.request.prompt.token_ids
        return prompt.size + sampling.num_completions * sampling.max_tokens


@dataclass(slots=True, kw_only=True)
class PoolEvents:
    """What one wait brought; the pool fills it in until the wait ends.

    ``lost`` groups died with a worker, and the pool has sent them again. ``dropped`` groups cannot
    be served. ``weights_lost``: the weight store is empty, so the learner must publish again.
    ``aborted_tokens``: tokens of training groups that were written and that nothing goes on with.
    ``waited_s``: how long the wait blocked.
    """

    groups: list[FinishedGroup] = field(default_factory=list)
    lost: list[GroupKey] = field(default_factory=list)
    dropped: list[GroupKey] = field(default_factory=list)
    completed: list[Pending[Any]] = field(default_factory=list)
    loads: list[LoadReport] = field(default_factory=list)
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    weights_lost: bool = False
    aborted_tokens: int = 0
    waited_s: float = 0.0


def least_loaded(workers: Sequence[Worker], rows: int, capacity: int, queue: int) -> Worker | None:
    """The ready worker with the least work that has room for ``rows`` more; None without one.

    Example: with a ``capacity`` of 8 rows, a worker with 6 rows has room for 4 more only where the
    ``queue`` is as long as the list of ready workers.

    A worker has room for its ``capacity`` (or for one group of any size). It takes as many rows
    again in advance, so that it need not wait for the driver when its rows become free one by one.
    It does so only while the queue has a group for each other worker: a group that waits in a busy
    worker is lost to a worker that becomes idle.
    """
    ready = [worker for worker in workers if worker.ready]
    limit = 2 * capacity if queue >= len(ready) else capacity
    free = [w for w in ready if not w.num_rows or w.num_rows + rows <= limit]
    return min(free, key=lambda worker: worker.load, default=None)


def choose_models(models: Sequence[Worker], turn: int) -> dict[str, Worker] | None:
    """One started reward model for each reward, chosen in turn; None where a reward has none."""
    chosen = {}
    for reward in {model.reward for model in models}:
        ready = [m for m in models if m.reward == reward and m.starting is None]
        if not ready:
            return None
        chosen[reward] = ready[turn % len(ready)]
    return chosen
