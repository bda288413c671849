"""Who gets the next group, and how idle time is measured: without processes."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.actors.idle import IdleClock, IdleReading, IdleShare
from raygrpo.actors.pool.dispatch import Dispatcher
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.pool.workers import Worker, least_loaded
from tests.builders import request

ROWS, CAPACITY = 4, 8


def workers(count: int) -> list[Worker]:
    return [Worker("generator", f"generator-{i}", None) for i in range(count)]


def give(worker: Worker, key: int, tokens: int) -> None:
    worker.groups.add(("train", key))
    worker.num_rows += ROWS
    worker.load += tokens


def test_the_fewest_tokens_win() -> None:
    one, two = workers(2)
    give(one, 0, 100)
    give(two, 1, 99)
    assert least_loaded([one, two], ROWS, CAPACITY, 1) is two
    give(two, 2, 1)
    assert least_loaded([one, two], ROWS, CAPACITY, 1) is one, "two is full, whatever it has to do"


@pytest.mark.parametrize("state", ["starting", "joining", "leaving"])
def test_who_may_not_work_gets_nothing(state: str) -> None:
    one, two = workers(2)
    give(two, 0, 100)
    setattr(one, state, "yes")
    assert least_loaded([one, two], ROWS, CAPACITY, 1) is two


def test_a_group_larger_than_the_capacity_goes_to_one_that_has_nothing() -> None:
    one, two = workers(2)
    assert least_loaded([one, two], 20, CAPACITY, 1) is one
    give(one, 0, 1)
    give(two, 1, 2)
    assert least_loaded([one, two], 20, CAPACITY, 1) is None


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    data=st.data(),
)
def test_nobody_is_idle_while_a_group_waits_in_the_queue(
    count: int, lengths: list[int], data: st.DataObject
) -> None:
    """Each takes up to twice its capacity, and work ahead only while the rest is served."""
    crew, queue = workers(count), list(enumerate(lengths))
    flying: list[tuple[Worker, int, int]] = []
    while queue or flying:
        while queue:
            chosen = least_loaded(crew, ROWS, CAPACITY, len(queue))
            if chosen is None:
                break
            if chosen.num_rows + ROWS > CAPACITY:
                assert len(queue) >= count, "others might become idle"
            key, tokens = queue.pop(0)
            give(chosen, key, tokens)
            flying.append((chosen, key, tokens))
        assert all(worker.num_rows <= 2 * CAPACITY for worker in crew)
        if queue:
            assert all(worker.num_rows >= CAPACITY for worker in crew)
        worker, key, tokens = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        worker.groups.remove(("train", key))
        worker.num_rows -= ROWS
        worker.load -= tokens


def test_what_is_still_to_be_written() -> None:
    whole = request(num_completions=3)
    assert whole.unfinished == (0, 1, 2)


def test_idle_clock_adds_up_spells() -> None:
    clock = IdleClock()
    begin = clock.read()
    clock.mark(busy=True)
    first = clock.read()
    assert clock.read().idle_s == first.idle_s, "busy time is not idle time"
    clock.mark(busy=True)
    clock.mark(busy=False)
    second = clock.read()
    assert second.idle_s >= first.idle_s >= begin.idle_s >= 0
    assert second.clock_s > begin.clock_s
    spell = threading.Event()
    spell.wait(0.05)
    third = clock.read()
    assert third.idle_s - second.idle_s == pytest.approx(third.clock_s - second.clock_s)
    assert third.clock_s <= time.monotonic()


def test_shares_leave_no_gap() -> None:
    share = IdleShare()
    assert share.take() is None
    share.update(IdleReading(10.0, 4.0))
    assert share.take() is None, "one reading spans nothing"
    share.update(IdleReading(12.0, 5.0))
    share.update(IdleReading(11.0, 4.5))  # overtaken
    assert share.take() == 0.5
    assert share.take() is None
    share.update(IdleReading(16.0, 5.0))
    assert share.take() == 0.0


class Copies:
    """In place of ``ray.wait``: what is asked for is here from the ``after``-th time on."""

    def __init__(self, after: int) -> None:
        self.asked: list[list[str]] = []
        self._after = after

    def __call__(self, refs: list[str], **_: object) -> tuple[list[str], list[str]]:
        self.asked.append(refs)
        return (refs, []) if len(self.asked) > self._after else ([], refs)


@pytest.mark.parametrize(
    ("after", "passed_s", "replaced"), [(0, 0, 1), (9, 0, 0), (9, 20, 0), (9, 40, 1)]
)
def test_who_leaves_stays_until_what_it_wrote_is_copied_or_its_time_is_up(
    monkeypatch: pytest.MonkeyPatch, after: int, passed_s: float, replaced: int
) -> None:
    copies, replacements = Copies(after), []
    monkeypatch.setattr("raygrpo.actors.pool.dispatch.ray.wait", copies)
    made = RolloutPool.__new__(RolloutPool)
    made._dispatcher = Dispatcher(60.0, CAPACITY)
    made._scorers = made._models = []
    made._config = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setattr(made, "_replace", lambda worker, reason: replacements.append(reason))
    made._dispatcher.submit(request(group_id=7))
    flight = next(iter(made._dispatcher.flights.values()))
    flight.partials, flight.kept_tokens = "written", 5
    (leaving,) = made._generators = workers(1)
    leaving.leaving, leaving.deadline = "drained", time.monotonic() + 15 - passed_s
    made._replace_left()
    # What is overdue without groups is not counted as a worker that died.
    made._check_deadlines()
    assert copies.asked == [["written"]]
    assert replacements == ["drained"] * replaced


def test_nothing_is_copied_while_nobody_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(0)
    monkeypatch.setattr("raygrpo.actors.pool.dispatch.ray.wait", copies)
    made = RolloutPool.__new__(RolloutPool)
    made._dispatcher, made._generators = Dispatcher(60.0, CAPACITY), workers(2)
    made._replace_left()
    assert copies.asked == []
    assert made._dispatcher.copied(1.0), "nothing is written, so nothing is to be copied"
