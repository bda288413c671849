"""Signals in the moments between a run's parts, sent to this very process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from raygrpo.commands.scope import open_scope
from raygrpo.commands.signals import Stopped, StopSignals
from raygrpo.commands.train import drive
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.tracker import Tracker
from raygrpo.training.trainer import Trainer


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
    with pytest.raises(Stopped):
        send()


def test_handlers_are_ours_again_and_other_exits_stay(signals: StopSignals) -> None:
    with signals.kept():
        signal.signal(signal.SIGTERM, exit_as_ray_does)
    with pytest.raises(Stopped):
        send()
    with pytest.raises(SystemExit, match="7"), signals.kept():
        sys.exit(7)


class Loop:
    """A trainer that is at step 3 at once."""

    step, driver_s_per_group, first_group_at = 3, 0.0, None

    def __init__(self, finished: bool) -> None:
        self._finished = finished
        self.stops = 0

    def run(self) -> bool:
        return self._finished

    def stop(self) -> None:
        self.stops += 1


class Records:
    """A tracker during whose every event a signal comes."""

    last_metrics: Mapping[str, float] = {}

    def event(self, kind: str, **fields: Any) -> None:
        send()

    def close(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize("finished", [False, True])
def test_a_signal_after_the_last_step_changes_nothing(
    finished: bool, signals: StopSignals, tmp_path: Path
) -> None:
    """Between the loop's return and the export the run is whole: it ends as it would have."""
    loop, records = Loop(finished), Records()
    outcome = drive(
        cast("Trainer", loop),
        RunDir(tmp_path),
        cast("Tracker", records),
        signals,
        lambda step: tmp_path / f"export-{step}",
        born=0.0,
    )
    assert loop.stops == 1
    assert records.exit_code == int(not finished)
    assert outcome.finished == finished
    assert outcome.export == (tmp_path / "export-3" if finished else None)


def test_a_signal_does_not_interrupt_the_closing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    closed: list[str] = []
    with open_scope() as scope:
        scope.closers.callback(closed.append, "last")
        scope.closers.callback(send)
    assert closed == ["last"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_an_open_scope_is_a_stop() -> None:
    closed: list[str] = []
    with pytest.raises(Stopped), open_scope() as scope:
        scope.closers.callback(closed.append, "last")
        send()
    assert closed == ["last"]
