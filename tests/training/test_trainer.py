"""What the loop makes of what a wait brought, where the order within one wait matters."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.actors.pool.workers import PoolEvents
from raygrpo.algorithm.ledger import TokenLedger
from raygrpo.config.file import load_config
from raygrpo.training.trainer import Trainer
from raygrpo.types import Version
from raygrpo.weights.types import PublishReport

REPORT = PublishReport(
    version=Version(1, 3), kind="full", num_bytes=1, full_bytes=1, changed_frac=None
)


def trainer(publish: Any, calls: list[str]) -> Trainer:
    """One between two steps; it notes what it has others do."""
    made = Trainer.__new__(Trainer)
    made._update, made._publish, made._sync = None, publish, {}
    made._weights_lost, made._boundary = False, SimpleNamespace(save=None)  # type: ignore[assignment]
    made._ledger = TokenLedger()
    made._tracker = SimpleNamespace(event=lambda *_, **__: None)  # type: ignore[assignment]
    made._pool = SimpleNamespace(  # type: ignore[assignment]
        replace_broken=lambda _: None, load=lambda: calls.append("load")
    )
    made._start_publish = lambda: calls.append("publish")  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("state", ["idle", "published in the same wait", "under way"])
def test_lost_weights_are_published_again_unless_they_just_were(state: str) -> None:
    """A store refuses a version that it has: the loss may be older than the publish."""
    publish = None if state == "idle" else SimpleNamespace(value=REPORT, seconds=0.1)
    completed: Any = (publish,) if state == "published in the same wait" else ()
    calls: list[str] = []
    trainer(publish, calls)._take(PoolEvents(completed=completed, weights_lost=True))
    expected = {"idle": ["publish"], "published in the same wait": ["load"], "under way": []}
    assert calls == expected[state]


def test_lost_weights_wait_for_a_save_under_way_and_are_not_forgotten() -> None:
    """The learner's calls queue: behind a long save a publish would miss its own deadline."""
    calls: list[str] = []
    made = trainer(None, calls)
    save = SimpleNamespace(open_refs=["rank 0"])
    made._boundary.save = save  # type: ignore[assignment]
    made._take(PoolEvents(weights_lost=True))
    assert calls == []
    save.open_refs = []  # written; it may still wait for its step's record
    made._take(PoolEvents())
    assert calls == ["publish"]


def ready_for_an_update(*, placement: str, asleep: bool) -> tuple[Trainer, list[str]]:
    """A trainer that may start an update, but for what the caller adds."""
    calls: list[str] = []
    made = trainer(None, calls)
    made._config = load_config(
        {
            "model": {"path": "m"},
            "data": {"source": "d"},
            "generators": {"placement": placement},
        }
    )
    made.step, made._incarnation = 3, 1
    made._boundary = SimpleNamespace(closed=True, is_last=False, save=None)  # type: ignore[assignment]

    def sleep() -> bool:
        calls.append("sleep")
        return asleep

    def take_step() -> list[Any]:
        calls.append("take_step")
        raise StopIteration  # what follows is not of interest

    made._pool = SimpleNamespace(sleep=sleep)  # type: ignore[assignment]
    made._window = SimpleNamespace(  # type: ignore[assignment]
        step_ready=lambda: True, take_step=take_step
    )
    made._rollouts = SimpleNamespace(has_room=True)  # type: ignore[assignment]
    return made, calls


@pytest.mark.parametrize(
    ("placement", "asleep", "expected"),
    [
        ("disaggregate", False, ["take_step"]),
        ("colocate", False, ["sleep"]),
        ("colocate", True, ["sleep", "take_step"]),
    ],
)
def test_an_update_waits_until_colocated_generators_sleep(
    placement: str, asleep: bool, expected: list[str]
) -> None:
    made, calls = ready_for_an_update(placement=placement, asleep=asleep)
    with contextlib.suppress(StopIteration):
        made._start_update()
    assert calls == expected


@pytest.mark.parametrize("busy", ["_publish", "_weights_lost"])
def test_no_update_starts_while_weights_are_published_again(busy: str) -> None:
    """Their load would wake generators beside a running update."""
    made, calls = ready_for_an_update(placement="colocate", asleep=True)
    setattr(made, busy, True)
    made._start_update()
    assert calls == []
