from __future__ import annotations

import pickle

import pytest

from raygrpo.actors.pool.failures import (
    MAX_ATTEMPTS,
    MAX_CONSECUTIVE_LOSSES,
    Action,
    History,
    decide,
)
from raygrpo.actors.pool.workers import Role
from raygrpo.errors import (
    ConfigError,
    DataError,
    InfraError,
    NumericError,
    RayGrpoError,
    RewardError,
    StorageError,
)

NONE = History()
TRIED = History(attempts=MAX_ATTEMPTS)
LOSING = History(consecutive_losses=MAX_CONSECUTIVE_LOSSES)
# A node took sixteen workers of forty along.
NODE = History(consecutive_losses=16, num_workers=40)
TWICE = History(consecutive_losses=80, num_workers=40)


@pytest.mark.parametrize(
    ("error", "role", "history", "died", "expected"),
    [
        (InfraError("gone"), "generator", NONE, True, Action.REPLACE_WORKER),
        (InfraError("gone"), "scorer", NONE, True, Action.REPLACE_WORKER),
        (InfraError("gone"), "generator", LOSING, True, Action.STOP),
        (InfraError("gone"), "generator", NODE, True, Action.REPLACE_WORKER),
        (InfraError("gone"), "generator", TWICE, True, Action.STOP),
        (InfraError("lost"), "generator", NONE, False, Action.RESUBMIT),
        (InfraError("lost"), "generator", TRIED, False, Action.DROP_GROUP),
        (InfraError("gone"), "learner", NONE, True, Action.STOP),
        (InfraError("gone"), "store", NONE, True, Action.STOP),
        (DataError("long"), "generator", NONE, False, Action.DROP_GROUP),
        (DataError("long"), "learner", NONE, False, Action.STOP),
        (NumericError("nan"), "generator", NONE, False, Action.STOP),
        (RewardError("bad"), "scorer", NONE, False, Action.STOP),
        (ConfigError("bad"), "generator", NONE, False, Action.STOP),
        (StorageError("full"), "scorer", NONE, False, Action.STOP),
        (KeyError("a bug"), "generator", NONE, False, Action.STOP),
    ],
)
def test_table(
    error: Exception, role: Role, history: History, died: bool, expected: Action
) -> None:
    assert decide(error, role, history, worker_died=died) is expected


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, InfraError, NumericError, RewardError, StorageError]
)
def test_errors_cross_processes(kind: type[RayGrpoError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", "do this")))
    assert (type(error), error.message, error.fix) == (kind, "what", "do this")
    assert str(error) == "what\n  fix: do this"
    assert str(kind("what")) == "what"
