"""Solved prompts: retired from the next epoch on, in the checkpoint, back when all are solved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.data.prompts import PromptSource
from raygrpo.types import GroupSummary
from tests import builders
from tests.data.data_cases import ROWS, source_of

SIZE = len(ROWS)
PER_STEP = 4
EVERYTHING = {f"row-{i}" for i in range(SIZE)}


def source(limit: float | None = 0.5, seed: int = 0) -> PromptSource:
    return source_of(ROWS, max_pass_rate=limit, seed=seed)


def judged(group_id: int, prompt_id: str, rewards: Sequence[float | str | None]) -> GroupSummary:
    return replace(builders.summary(group_id, rewards), prompt_id=prompt_id)


def epoch(prompts: PromptSource) -> set[str]:
    """The prompts up to the end of the epoch that the next one begins."""
    drawn = {prompts.next().id}
    while prompts.epoch % 1:
        drawn.add(prompts.next().id)
    return drawn


def solve(prompts: PromptSource, *rows: int) -> None:
    prompts.observe([judged(row, f"row-{row}", [1.0, 1.0]) for row in rows])
    prompts.settle(max(rows))


def test_solved_prompts_are_left_out_from_the_next_epoch_on() -> None:
    prompts = source()
    prompts.next()
    solve(prompts, 2, 5)
    assert prompts.metrics() == {"data/num_retired": 2.0, "data/num_restored": 0.0}
    drawn = {prompts.next().id for _ in range(SIZE - 1)}
    assert {"row-2", "row-5"} & drawn, "the running epoch is not changed"
    assert epoch(prompts) == epoch(prompts) == EVERYTHING - {"row-2", "row-5"}
    assert prompts.epoch == 3.0


def test_the_limit_counts_and_errors_do_not() -> None:
    prompts = source(limit=0.5)
    rewards: list[list[float | str | None]] = [
        [1.0, 0.0],
        [1.0, 0.0, 0.0],
        [1.0, "broke", 0.0, 0.0],
        ["broke", "broke"],
        [1.0, "broke"],
        [0.99, 0.99],
    ]
    prompts.observe([judged(row, f"row-{row}", found) for row, found in enumerate(rewards)])
    prompts.settle(5)
    epoch(prompts)
    assert epoch(prompts) == {f"row-{i}" for i in (1, 2, 3, 5, 6)}


def test_only_what_a_step_has_settled_counts() -> None:
    prompts = source()
    prompts.observe([judged(3, "row-3", [1.0, 1.0]), judged(9, "row-4", [1.0, 1.0])])
    prompts.settle(8)
    epoch(prompts)
    assert epoch(prompts) == EVERYTHING - {"row-3"}
    prompts.settle(9)
    assert epoch(prompts) == EVERYTHING - {"row-3", "row-4"}


def test_what_no_step_has_settled_yet_is_in_the_state() -> None:
    """Dropped groups of a step that a stop cuts short are not generated again."""
    first, second = source(), source()
    first.observe([judged(3, "row-3", [1.0, 1.0])])
    second.restore(json.loads(json.dumps(first.state())))
    second.settle(8)
    epoch(second)
    assert epoch(second) == EVERYTHING - {"row-3"}


def test_without_a_limit_nothing_is_remembered() -> None:
    prompts = source(limit=None)
    solve(prompts, *range(SIZE))
    epoch(prompts)
    assert epoch(prompts) == EVERYTHING
    assert prompts.metrics() == {}


def test_when_all_are_solved_all_come_back() -> None:
    prompts = source()
    solve(prompts, *range(SIZE))
    assert prompts.metrics()["data/num_retired"] == SIZE
    epoch(prompts)
    assert epoch(prompts) == EVERYTHING
    assert prompts.metrics() == {"data/num_retired": 0.0, "data/num_restored": float(SIZE)}
    assert prompts.metrics()["data/num_restored"] == 0.0, "it is told once"


# What a run does: steps of groups, some solved, finishing in any order.


def run(prompts: PromptSource, solved: set[str], num_groups: int, start: int = 0) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < num_groups:
        ids = [prompts.next().id for _ in range(PER_STEP)]
        first = start + len(drawn)
        for i, name in enumerate(ids):
            prompts.observe([judged(first + i, name, [1.0, float(name in solved)])])
        prompts.settle(first + PER_STEP - 1)
        drawn += ids
    return drawn


@settings(max_examples=40, deadline=None)
@given(
    solved=st.sets(st.integers(0, SIZE - 1).map(lambda i: f"row-{i}")),
    steps=st.integers(0, 8),
    seed=st.integers(0, 3),
)
def test_a_resumed_run_draws_what_the_whole_one_draws(
    solved: set[str], steps: int, seed: int
) -> None:
    whole = run(source(1.0, seed), solved, PER_STEP * (steps + 8))
    first = source(1.0, seed)
    run(first, solved, PER_STEP * steps)
    second = source(1.0, seed)
    state: dict[str, Any] = json.loads(json.dumps(first.state()))
    second.restore(state)
    assert second.epoch == first.epoch
    rest = run(second, solved, PER_STEP * 8, start=PER_STEP * steps)
    assert rest == whole[PER_STEP * steps :]


@given(order=st.permutations(range(PER_STEP)))
def test_the_order_within_a_step_does_not_matter(order: list[int]) -> None:
    """A refill drawn between two decisions of one step must not see the first."""
    drawn = []
    for sequence in (range(PER_STEP), order):
        prompts = source()
        names = [prompts.next().id for _ in range(SIZE - 1)]
        for i in sequence:
            prompts.observe([judged(i, names[i], [1.0, 1.0])])
            if i == sequence[1]:
                refill = [prompts.next().id, prompts.next().id]
        prompts.settle(SIZE)
        drawn.append((refill, [prompts.next().id for _ in range(20)]))
    assert drawn[0] == drawn[1]
