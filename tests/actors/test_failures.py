from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from raygrpo.actors.pool.failures import MAX_ATTEMPTS, MAX_DEATHS_IN_A_ROW, Action, History, decide
from raygrpo.errors import (
    ConfigError,
    DataError,
    InfraError,
    NumericError,
    RayGrpoError,
    RewardError,
    StorageError,
)

CALL = History()
TRIED = History(attempts=MAX_ATTEMPTS)
DEATH = History(worker_died=True)
DYING = History(worker_died=True, deaths_in_a_row=MAX_DEATHS_IN_A_ROW)
# A node took sixteen workers of forty along.
NODE = History(worker_died=True, deaths_in_a_row=16, num_workers=40)
TWICE = History(worker_died=True, deaths_in_a_row=80, num_workers=40)


@pytest.mark.parametrize(
    ("error", "history", "expected"),
    [
        (InfraError("gone"), DEATH, Action.REPLACE_WORKER),
        (InfraError("gone"), DYING, Action.STOP),
        (InfraError("gone"), NODE, Action.REPLACE_WORKER),
        (InfraError("gone"), TWICE, Action.STOP),
        (InfraError("lost"), CALL, Action.SEND_AGAIN),
        (InfraError("lost"), TRIED, Action.DROP_GROUP),
        (InfraError("lost"), replace(DYING, worker_died=False), Action.STOP),
        (DataError("long"), CALL, Action.DROP_GROUP),
        (NumericError("nan"), CALL, Action.STOP),
        (RewardError("bad"), CALL, Action.STOP),
        (ConfigError("bad"), CALL, Action.STOP),
        (StorageError("full"), CALL, Action.STOP),
        (KeyError("a bug"), CALL, Action.STOP),
        (KeyError("a bug"), DEATH, Action.STOP),
    ],
)
def test_table(error: Exception, history: History, expected: Action) -> None:
    assert decide(error, history) is expected


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, InfraError, NumericError, RewardError, StorageError]
)
def test_errors_cross_processes(kind: type[RayGrpoError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", "do this")))
    assert (type(error), error.message, error.fix) == (kind, "what", "do this")
    assert str(error) == "what\n  fix: do this"
    assert str(kind("what")) == "what"
