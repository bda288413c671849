"""Failure is a value: one pure function decides what a failure leads to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from raygrpo.actors.pool.workers import Role
from raygrpo.errors import DataError, InfraError

MAX_ATTEMPTS = 3
MAX_DEATHS = 4
MAX_CONSECUTIVE_LOSSES = 8


class Action(Enum):
    """What the driver does next."""

    RESUBMIT = "resubmit"
    DROP_GROUP = "drop_group"
    REPLACE_WORKER = "replace_worker"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What came before a failure.

    ``attempts``: how often this group was tried; ``consecutive_losses``: workers lost since the
    last group finished, in the whole pool of ``num_workers``. Weeks on preemptible machines lose
    many workers, and a node takes all of its own along, so losses count only while nothing
    finishes, and a pool may be lost twice over.
    """

    attempts: int = 0
    consecutive_losses: int = 0
    num_workers: int = 1

    @property
    def too_many_losses(self) -> bool:
        """Whether starting workers again has proven useless."""
        return self.consecutive_losses >= max(MAX_CONSECUTIVE_LOSSES, 2 * self.num_workers)


def decide(error: BaseException, role: Role, history: History, *, worker_died: bool) -> Action:
    """What to do about ``error`` in a call to ``role``.

    A dead worker is replaced and its groups are sent again, until nothing finishes any more; an
    answer that was lost with its node is computed again; a group that cannot be served is given up
    (so is one that was with ``MAX_DEATHS`` workers when they died); everything else stops the run:
    bad configuration, failing rewards, numbers that are not finite, storage, a dead learner, bugs.
    """
    if role in ("learner", "store"):
        return Action.STOP
    if isinstance(error, DataError):
        return Action.DROP_GROUP
    if not isinstance(error, InfraError):
        return Action.STOP
    if history.too_many_losses:
        return Action.STOP
    if worker_died:
        return Action.REPLACE_WORKER
    return Action.RESUBMIT if history.attempts < MAX_ATTEMPTS else Action.DROP_GROUP
