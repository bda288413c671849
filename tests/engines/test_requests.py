"""Which groups an engine takes, in which order, and which it refuses: the same for all engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raygrpo.engines.requests import Admission, Running, not_finite
from raygrpo.errors import DataError, InfraError
from raygrpo.types import GroupRequest, Version
from tests.builders import completion, request

NOW = Version(1, 3)
MAX_ROWS = 4


class Rows:
    """An engine's room for MAX_ROWS completions; a larger group runs alone."""

    def __init__(self) -> None:
        self.admission: Admission[Running] = Admission(max_positions=20, vocab_size=10)

    def fits(self, count: int) -> bool:
        running = self.admission.running.values()
        rows = sum(len(group.request.unfinished) for group in running)
        return not rows or rows + count <= MAX_ROWS

    def start(self, order: GroupRequest, serial: int) -> Running:
        return Running(order, serial, 0.0)

    def admit(self) -> list[int]:
        """The ids of the groups that enter now."""
        return [g.request.group_id for g in self.admission.admit(NOW, self.fits, self.start)]

    def finish(self, group_id: int) -> None:
        group = self.admission.drop("train", group_id)
        assert group is not None
        self.admission.finish(group, [completion([1])] * 2)


def test_groups_enter_in_order_while_there_is_room() -> None:
    rows = Rows()
    for group_id in (5, 1, 3):
        rows.admission.submit(request(group_id))
    assert rows.admit() == [5, 1]
    assert rows.admit() == []
    rows.finish(5)
    assert rows.admission.num_unfinished == 3
    (done,) = rows.admission.take_finished()
    assert (done.request.group_id, done.request.partials) == (5, ())
    assert rows.admission.num_unfinished == 2
    assert rows.admit() == [3]


def test_a_group_larger_than_the_room_runs_alone() -> None:
    rows = Rows()
    for group_id, count in {0: 2, 1: MAX_ROWS + 1, 2: 2}.items():
        rows.admission.submit(request(group_id, num_completions=count))
    assert rows.admit() == [0], "no later group overtakes one that waits for room"
    rows.finish(0)
    assert rows.admit() == [1]


def test_a_group_waits_for_its_version_and_later_groups_do_not_wait_for_it() -> None:
    rows = Rows()
    rows.admission.submit(request(0, step=NOW.step + 1))
    assert not rows.admission.can_step(NOW)
    rows.admission.submit(request(1, step=NOW.step))
    assert not rows.admission.can_step(None)
    assert rows.admission.can_step(NOW)
    assert rows.admit() == [1]
    rows.finish(1)
    assert rows.admission.can_step(NOW), "there is a group to return"
    rows.admission.take_finished()
    assert not rows.admission.can_step(NOW)


def test_a_group_may_come_again_once_it_is_dropped() -> None:
    rows = Rows()
    rows.admission.submit(request(0))
    with pytest.raises(InfraError, match="train/0 is being generated already"):
        rows.admission.submit(request(0))
    assert rows.admission.drop("train", 0) is None, "it had not begun"
    rows.admission.submit(request(0))
    assert rows.admit() == [0]
    with pytest.raises(InfraError, match="being generated already"):
        rows.admission.submit(request(0))
    rows.admission.submit(replace(request(0), stream="eval"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 18}, "3 tokens and max_tokens 18 exceed the model's 20 positions"),
        ({"tokens": (1, 10)}, "outside the model's 10"),
        ({"tokens": (-1, 2)}, "outside the model's 10"),
    ],
)
def test_what_could_never_finish_is_refused(changes: dict[str, Any], message: str) -> None:
    rows = Rows()
    with pytest.raises(DataError, match=message):
        rows.admission.submit(request(0, **changes))
    assert rows.admission.num_unfinished == 0
    rows.admission.submit(request(0, max_tokens=17))


def test_bad_numbers_name_their_groups_and_the_version() -> None:
    groups = [Running(request(group_id), group_id, 0.0) for group_id in (4, 7)]
    error = not_finite(groups, NOW)
    assert "train/4, train/7: logprobs are not finite under version" in error.message
