"""Who gets the next group, and how idle time is measured: without processes."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.actors.idle import IdleClock, IdleReading, IdleShare
from raygrpo.actors.workers import Worker, least_loaded
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
