"""Signals in the moments between a run's parts, sent to this very process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.commands.signals import Stopped, StopSignals
from raygrpo.commands.train import Session
from tests import builders


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    made = StopSignals()
    made.install()
    yield made
    made.uninstall()


def exit_as_ray_does(number: int, frame: Any) -> None:
    sys.exit(number)


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_came_to_other_handlers_is_a_stop(signals: StopSignals) -> None:
    with pytest.raises(Stopped), signals.kept():
        signal.signal(signal.SIGTERM, exit_as_ray_does)
        send()
    assert signal.getsignal(signal.SIGTERM) == signals._handle


def test_handlers_are_ours_again_and_other_exits_stay(signals: StopSignals) -> None:
    with signals.kept():
        signal.signal(signal.SIGTERM, exit_as_ray_does)
    with pytest.raises(Stopped):
        send()
    with pytest.raises(SystemExit, match="7"), signals.kept():
        sys.exit(7)


@pytest.mark.parametrize("finished", [False, True])
def test_a_signal_after_the_last_step_changes_nothing(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the loop's return and the export the run is whole: it ends as it would have."""
    stops: list[str] = []
    trainer = SimpleNamespace(
        run=lambda: finished,
        stop=lambda: stops.append("asked"),
        step=3,
        driver_s_per_group=0.0,
        first_group_at=0.0,
    )
    monkeypatch.setattr("raygrpo.training.trainer.Trainer", lambda *_: trainer)
    monkeypatch.setattr("raygrpo.training.wiring.Wiring", lambda **_: None)
    names = ("_pool", "_learner", "_prompts", "_eval_prompts", "_rollouts", "_checkpoints")
    with Session(builders.config()) as session:
        for name in (*names, "_incarnation", "_restored"):
            setattr(session, name, None)
        session.run_dir = SimpleNamespace(root=tmp_path)  # type: ignore[assignment]
        session._export = lambda step: tmp_path / "export"  # type: ignore[method-assign]
        tracker = SimpleNamespace(
            event=lambda *_, **__: send(), close=lambda **_: None, last_metrics={}
        )
        session._tracker = tracker  # type: ignore[assignment]
        outcome = session.run()
    assert stops == ["asked"]
    assert (outcome.finished, outcome.export is None) == (finished, not finished)


def test_a_signal_does_not_interrupt_the_closing() -> None:
    closed: list[str] = []
    with Session(builders.config()) as session:
        session._closers.callback(closed.append, "last")
        session._closers.callback(send)
    assert closed == ["last"]
