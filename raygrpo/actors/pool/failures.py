"""Failure is a value: one pure function says what a failure leads to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from raygrpo.errors import DataError, InfraError

MAX_ATTEMPTS = 3  # tries of one group whose worker lives
MAX_GROUP_DEATHS = 4  # workers that died while they had the same group
MAX_DEATHS_IN_A_ROW = 8


class Action(Enum):
    """What the pool does about a failure."""

    SEND_AGAIN = "send_again"
    DROP_GROUP = "drop_group"
    REPLACE_WORKER = "replace_worker"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The circumstances of a failure. Example: History(attempts=2, num_workers=5).

    ``worker_died``: whether the failure cost a worker, and not only one group's call. ``attempts``:
    how often that group was tried. ``deaths_in_a_row``: workers that died since a group finished,
    in the whole pool of ``num_workers``.
    """

    worker_died: bool = False
    attempts: int = 0
    deaths_in_a_row: int = 0
    num_workers: int = 1


def decide(error: BaseException, history: History) -> Action:
    """What ``error`` in a call to a worker leads to; asked once for each failure.

    A dead worker is replaced, and its groups are sent again, while groups still finish now and
    then. An answer that was lost with its node is computed again. A group that cannot be served is
    given up. Every other error stops the run: a bad configuration, failing rewards, numbers that
    are not finite, storage, bugs.
    """
    # Weeks on preemptible machines cost many workers, and a node takes all of its workers along: so
    # deaths count only while no group finishes, and the whole pool may die twice.
    hopeless = history.deaths_in_a_row >= max(MAX_DEATHS_IN_A_ROW, 2 * history.num_workers)
    if isinstance(error, DataError):
        return Action.DROP_GROUP
    if not isinstance(error, InfraError) or hopeless:
        return Action.STOP
    if history.worker_died:
        return Action.REPLACE_WORKER
    return Action.SEND_AGAIN if history.attempts < MAX_ATTEMPTS else Action.DROP_GROUP
