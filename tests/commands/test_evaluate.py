"""A session without a learner over a pool that answers as told: what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raygrpo.actors.pool.workers import PoolEvents
from raygrpo.commands.evaluate import RolloutSession
from raygrpo.config.file import load_config
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import FinishedGroup, Group, GroupRequest
from tests.builders import completion, prompt
from tests.builders import summary as summary_of


class Pool:
    """Drops the groups that it is told to drop, and finishes all others."""

    def __init__(self, *dropped: int) -> None:
        self._dropped = dropped
        self._sent: list[GroupRequest] = []

    def submit(self, request: GroupRequest) -> None:
        self._sent.append(request)

    def wait(self, pendings: Sequence[Any], timeout_s: float, state: TrainerState) -> PoolEvents:
        sent, self._sent = self._sent, []
        served = [request for request in sent if request.group_id not in self._dropped]
        return PoolEvents(
            groups=tuple(self._finish(request) for request in served),
            dropped=tuple((r.stream, r.group_id) for r in sent if r not in served),
        )

    def _finish(self, request: GroupRequest) -> FinishedGroup:
        count = request.sampling.num_completions
        rewards = [float(index % 2) for index in range(count)]
        made = replace(summary_of(request.group_id, rewards), answers=("",) * count)
        group = Group(request=request, completions=(completion([5, 6, 7, 8]),) * count)
        return FinishedGroup(summary=made, payload=group, teaches=request.group_id != 3)


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
    made._eval_prompts = [prompt(name=str(i)) for i in range(3)]
    made._prompts = type("Prompts", (), {"next": lambda self: prompt()})()  # type: ignore[assignment]
    return made


def test_what_cannot_be_served_is_counted() -> None:
    metrics = session(Pool(2, 3, 5)).evaluate().metrics
    assert metrics["eval/num_dropped"] == 3
    assert (metrics["eval/greedy/num_completions"], metrics["eval/num_completions"]) == (2, 2)
    assert session(Pool()).evaluate().metrics["eval/num_dropped"] == 0


def test_generated_groups_say_whether_they_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygrpo.actors.futures.resolve", lambda payload, name: payload)
    made = session(Pool(1)).generate(4, tmp_path)
    assert made.num_groups == 3
    assert made.metrics["num_dropped"] == 1
    assert made.metrics["frac_groups_with_signal"] == 2 / 3
    rows = pq.read_table(made.path).to_pylist()
    fates = {0: "generated", 2: "generated", 3: "no_signal"}
    assert [(row["group_id"], row["fate"]) for row in rows] == [
        pair for pair in fates.items() for _ in range(2)
    ]
