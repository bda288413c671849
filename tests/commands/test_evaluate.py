"""A session without a learner over a pool that answers as told: what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raygrpo.actors.pool.workers import Done
from raygrpo.actors.scorer import ScoreReport
from raygrpo.algorithm.window import FinishedGroup
from raygrpo.commands.evaluate import RolloutSession
from raygrpo.config.file import load_config
from raygrpo.training.evaluation import Order
from raygrpo.types import Group, GroupRequest
from tests.builders import completion, prompt
from tests.builders import summary as summary_of


class Pool:
    """Loses each group's first attempt, drops what it is told to, and finishes all else."""

    def __init__(self, *dropped: int, **summary: Any) -> None:
        self._dropped, self._summary = dropped, summary
        self._sent: list[Order] = []

    def submit(self, order: Order) -> None:
        self._sent.append(order)

    def wait(self, pendings: Sequence[Any], timeout_s: float) -> Done:
        lost, dropped, groups = [], [], []
        for order in self._sent:
            assert isinstance(order, GroupRequest)
            key = (order.stream, order.group_id)
            if not order.attempt:
                lost.append(key)
            elif order.group_id in self._dropped:
                dropped.append(key)
            else:
                groups.append(self._finish(order))
        self._sent.clear()
        return Done(groups=tuple(groups), lost=tuple(lost), dropped=tuple(dropped))

    def _finish(self, order: GroupRequest) -> tuple[FinishedGroup, ScoreReport]:
        count = order.sampling.num_completions
        rewards = [float(index % 2) for index in range(count)]
        made = replace(summary_of(order.group_id, rewards, **self._summary), answers=("",) * count)
        group = Group(request=order, completions=(completion([5, 6, 7, 8]),) * count)
        report = ScoreReport(summary=made, traceback=None, extras={})
        return FinishedGroup(summary=made, payload=group), report


def session(pool: Pool, **sections: Any) -> RolloutSession:
    made = RolloutSession(
        load_config(
            {
                "model": {"path": "m"},
                "data": {"source": "d"},
                "sampling": {"num_completions": 2},
                "rewards": [{"func": "exact", "name": "r"}],
                "eval": {"eval_steps": 1, "num_completions": 2},
                **sections,
            }
        )
    )
    made._pool = pool  # type: ignore[assignment]
    made._eval_prompts, made._constants = [prompt(name=str(i)) for i in range(3)], []
    made._prompts = type("Prompts", (), {"next": lambda self: prompt()})()  # type: ignore[assignment]
    return made


def test_what_cannot_be_served_is_counted() -> None:
    metrics = session(Pool(2, 3, 5)).evaluate().metrics
    assert metrics["eval/num_dropped"] == 3
    assert (metrics["eval/greedy/num_completions"], metrics["eval/num_completions"]) == (2, 2)
    assert session(Pool()).evaluate().metrics["eval/num_dropped"] == 0


@pytest.mark.parametrize(
    ("advantage", "fate"), [({}, "generated"), ({"mask_truncated": True}, "no_signal")]
)
def test_generated_groups_teach_what_training_would_learn(
    advantage: dict[str, Any], fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygrpo.actors.futures.resolve", lambda payload, name: payload)
    pool = Pool(1, finishes=["length", "length"])
    made = session(pool, advantage=advantage).generate(4, tmp_path)
    assert made.num_groups == 3
    assert made.metrics["num_dropped"] == 1
    assert made.metrics["frac_groups_with_signal"] == (fate == "generated")
    rows = pq.read_table(made.path).to_pylist()
    assert [row["group_id"] for row in rows] == [0, 0, 2, 2, 3, 3]
    assert {row["fate"] for row in rows} == {fate}
