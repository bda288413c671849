"""Who gets the next group, and how idle time is measured: without processes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from raygrpo.actors.cluster.site import Site
from raygrpo.actors.generator import GenerationReport
from raygrpo.actors.idle import IdleClock, IdleReading, IdleShare
from raygrpo.actors.pool.dispatch import Dispatcher
from raygrpo.actors.pool.failures import MAX_DEATHS_IN_A_ROW, MAX_GROUP_DEATHS
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.pool.workers import Role, Worker, least_loaded
from raygrpo.actors.scorer import ScoreReport
from raygrpo.errors import InfraError
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import FinishedGroup
from tests import builders
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


STATE = TrainerState(global_step=0, max_steps=1)
WRITTEN = 5  # tokens of a group that a generator gives back


class FakeRay:
    """In place of Ray: ``answers`` are the calls that have ended, by reference; ``killed`` actors
    are noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Any] = {}
        self.killed: list[Any] = []
        monkeypatch.setattr(ray, "wait", self._wait)
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(ray, "kill", self.killed.append)

    def _get(self, ref: str, timeout: float) -> Any:
        if isinstance(answer := self.answers[ref], Exception):
            raise answer
        return answer

    def _wait(self, refs: list[str], **_: object) -> tuple[list[str], list[str]]:
        return (
            [ref for ref in refs if ref in self.answers],
            [ref for ref in refs if ref not in self.answers],
        )


class Factory:
    """Makes workers whose calls are references by name: ``report``, ``payload``, ``scores``."""

    def __init__(self, *_: object, **__: object) -> None:
        """Knows no configuration."""

    def all(self, role: Role) -> list[Worker]:
        return [self.make(role, 0)]

    def make(self, role: Role, index: int) -> Worker:
        actor = MagicMock()
        actor.generate.options.return_value.remote.return_value = ("report", "payload")
        actor.score.remote.return_value = "scores"
        return Worker(role, f"{role}-{index}", actor)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    monkeypatch.setattr("raygrpo.actors.pool.pool.WorkerFactory", Factory)
    return FakeRay(monkeypatch)


def pool() -> RolloutPool:
    return RolloutPool(builders.config(), None, {}, Site(local=True))


@pytest.mark.parametrize(
    ("copied", "passed_s", "leaves"),
    [(True, 0, True), (False, 0, False), (False, 20, False), (False, 40, True)],
)
def test_who_leaves_stays_until_what_it_wrote_is_copied_or_its_time_is_up(
    fake: FakeRay, copied: bool, passed_s: float, leaves: bool
) -> None:
    made = pool()
    (leaving,) = made.generators
    made.submit(request(group_id=7))
    made.retire(leaving, "drained")
    leaving.deadline -= passed_s
    fake.answers["report"] = GenerationReport(group_id=7, aborted_tokens=WRITTEN)
    if copied:
        fake.answers["payload"] = "tokens"
    kinds = [kind for kind, _ in made.wait([], 0, STATE).events]
    # A generator that is overdue without groups is not counted as a worker that died.
    assert kinds == ["worker_leaving"] + ["worker_replaced"] * leaves
    assert fake.killed == [leaving.actor] * leaves
    # Another generator goes on with the group's tokens, as the same attempt.
    order, partials = made.generators[0].actor.generate.options().remote.call_args[0]
    assert (order.group_id, order.attempt) == (7, 0)
    assert partials == ("payload" if leaves else ())


def test_groups_that_were_lost_go_first_as_their_next_attempt() -> None:
    dispatcher = Dispatcher(60.0, ROWS)
    (generator,) = Factory().all("generator")
    for group_id in range(4):
        dispatcher.submit(request(group_id, num_completions=ROWS))
    dispatcher.generate([generator])
    assert generator.groups == {("train", 0), ("train", 1)}, "one to decode, one ahead"
    for group_id in (1, 0):
        dispatcher.send_again(("train", group_id))
    dispatcher.generate([generator])
    calls = generator.actor.generate.options().remote.call_args_list
    sent = [(order.group_id, order.attempt) for (order, _), _ in calls]
    assert sent == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_stream_that_is_forgotten_is_served_no_more() -> None:
    dispatcher = Dispatcher(60.0, CAPACITY)
    (generator,) = Factory().all("generator")
    dispatcher.submit(replace(request(0), stream="eval"))
    dispatcher.generate([generator])
    dispatcher.submit(replace(request(1), stream="eval"))
    dispatcher.submit(request(2))
    dispatcher.forget("eval")
    dispatcher.generate([generator])
    assert generator.groups == {("train", 2)}
    assert list(dispatcher.flights) == [("train", 2)]


def finish(fake: FakeRay, made: RolloutPool) -> list[FinishedGroup]:
    """The groups of the waits in which a group is generated, then scored."""
    scores = ScoreReport(
        summary=builders.summary(7, [1.0, 0.0]), traceback="raised", extras={"note": ("a", "b")}
    )
    fake.answers = {"report": GenerationReport(group_id=7)}
    assert made.wait([], 0, STATE).groups == []
    fake.answers = {"scores": scores}
    return made.wait([], 0, STATE).groups


def test_a_group_is_generated_then_scored(fake: FakeRay) -> None:
    made = pool()
    made.submit(request(7))
    (group,) = finish(fake, made)
    assert (group.payload, group.teaches, group.fate) == ("payload", True, None)
    assert (group.traceback, group.extras) == ("raised", {"note": ("a", "b")})


def test_a_dead_generators_groups_are_sent_again_and_reported_once(fake: FakeRay) -> None:
    made = pool()
    for group_id in (7, 8):
        made.submit(request(group_id))
    fake.answers = {"report": RayActorError()}
    events = made.wait([], 0, STATE)
    assert events.lost == [("train", 7), ("train", 8)]
    assert [kind for kind, _ in events.events] == ["worker_replaced"]
    calls = made.generators[0].actor.generate.options().remote.call_args_list
    sent = [(order.group_id, order.attempt, partials) for (order, partials), _ in calls]
    assert sent == [(7, 1, ()), (8, 1, ())]
    assert len(finish(fake, made)) == 2


def test_a_group_that_takes_its_workers_down_is_given_up(fake: FakeRay) -> None:
    made = pool()
    made.submit(request(7))
    fake.answers = {"report": RayActorError()}
    for _ in range(MAX_GROUP_DEATHS - 1):
        assert made.wait([], 0, STATE).lost == [("train", 7)]
    events = made.wait([], 0, STATE)
    assert (events.lost, events.dropped) == ([], [("train", 7)])
    assert [kind for kind, _ in events.events] == ["group_dropped", "worker_replaced"]


def test_deaths_stop_the_run_only_while_no_group_finishes(fake: FakeRay) -> None:
    made = pool()

    def die(times: int) -> None:
        for group_id in range(times):
            made.submit(request(100 + group_id))
            fake.answers = {"report": RayActorError()}
            made.wait([], 0, STATE)
            made.forget("train")

    die(MAX_DEATHS_IN_A_ROW)
    made.submit(request(7))
    assert len(finish(fake, made)) == 1
    die(MAX_DEATHS_IN_A_ROW)
    with pytest.raises(InfraError, match=f"{MAX_DEATHS_IN_A_ROW} workers died in a row"):
        die(1)
