"""Evaluation and generation over a pool that answers as told: what is counted."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raygrpo.actors.pool.workers import PoolEvents
from raygrpo.commands.evaluate import Rollouts, evaluate_prompts, generate_groups
from raygrpo.commands.signals import Stopped, StopSignals
from raygrpo.errors import RewardError
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import FinishedGroup, Group, GroupRequest
from tests import builders
from tests.builders import completion, prompt
from tests.builders import summary as summary_of
from tests.data.data_cases import ROWS, source_of


class Pool:
    """Drops the groups that it is told to drop, and finishes all others."""

    def __init__(
        self,
        *dropped: int,
        errors: Mapping[int, str] | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._dropped, self._errors, self._on_wait = dropped, errors or {}, on_wait
        self._sent: list[GroupRequest] = []

    def submit(self, request: GroupRequest) -> None:
        self._sent.append(request)

    def wait(self, pendings: Sequence[Any], timeout_s: float, state: TrainerState) -> PoolEvents:
        self._on_wait()
        sent, self._sent = self._sent, []
        served = [request for request in sent if request.group_id not in self._dropped]
        return PoolEvents(
            groups=[self._finish(request) for request in served],
            dropped=[(r.stream, r.group_id) for r in sent if r not in served],
        )

    def _finish(self, request: GroupRequest) -> FinishedGroup:
        count = request.sampling.num_completions
        rewards: list[float | str | None] = [float(index % 2) for index in range(count)]
        if request.group_id in self._errors:
            rewards[0] = self._errors[request.group_id]
        made = replace(summary_of(request.group_id, rewards), answers=("",) * count)
        group = Group(request=request, completions=(completion([5, 6, 7, 8]),) * count)
        return FinishedGroup(summary=made, payload=group, teaches=request.group_id != 3)


def rollouts(pool: Pool, **sections: Any) -> Rollouts:
    config = builders.config(
        sampling={"num_completions": 2},
        rewards=[{"func": "exact", "name": "r"}],
        eval={"eval_steps": 1, "num_completions": 2},
        **sections,
    )
    return Rollouts(
        config=config, trained=0, pool=pool, signals=StopSignals(), on_event=lambda *_: None
    )


PROMPTS = [prompt(name=str(i)) for i in range(3)]


def test_what_cannot_be_served_is_counted() -> None:
    metrics = evaluate_prompts(rollouts(Pool(2, 3, 5)), PROMPTS).metrics
    assert metrics["eval/num_dropped"] == 3
    assert (metrics["eval/greedy/num_completions"], metrics["eval/num_completions"]) == (2, 2)
    assert evaluate_prompts(rollouts(Pool()), PROMPTS).metrics["eval/num_dropped"] == 0


def test_a_broken_reward_ends_an_evaluation() -> None:
    """Each greedy group has one completion, each sampled one two: the first error is too much."""
    broken = Pool(errors={0: "no judge"})
    with pytest.raises(RewardError, match=r"1 of 9 scores failed .* is 0\.1\); no judge"):
        evaluate_prompts(rollouts(broken), PROMPTS)
    allowed = rollouts(Pool(errors={0: "no judge"}), scorers={"max_reward_error_frac": 0.2})
    assert evaluate_prompts(allowed, PROMPTS).metrics["eval/num_dropped"] == 0


def test_generated_groups_say_whether_they_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygrpo.actors.futures.resolve", lambda payload, name: payload)
    made = generate_groups(rollouts(Pool(1)), source_of(ROWS), 4, tmp_path)
    assert made.num_groups == 3
    assert made.metrics["num_dropped"] == 1
    assert made.metrics["frac_groups_with_signal"] == 2 / 3
    rows = pq.read_table(made.path).to_pylist()
    fates = {0: "generated", 2: "generated", 3: "no_signal"}
    assert [(row["group_id"], row["fate"]) for row in rows] == [
        pair for pair in fates.items() for _ in range(2)
    ]


def test_a_signal_stops_between_two_waits() -> None:
    signals = StopSignals()
    signals.install()
    try:
        interrupted = Pool(on_wait=lambda: os.kill(os.getpid(), signal.SIGTERM))
        asked = replace(rollouts(interrupted), signals=signals)
        with pytest.raises(Stopped):
            evaluate_prompts(asked, PROMPTS)
    finally:
        signals.uninstall()
