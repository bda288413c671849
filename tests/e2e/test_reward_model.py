"""Reward models in actors of their own: killed in a run, stopped, killed between two calls."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from raygrpo.actors.cluster.connect import connect, disconnect
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.rewards.contract import TrainerState
from raygrpo.rewards.params import RewardModelParams
from raygrpo.rewards.reward_model import RewardModel
from raygrpo.types import Group, GroupRequest, GroupSummary, Version
from tests import runs
from tests.builders import written
from tests.tiny_reward import save_tiny_reward_model

pytestmark = [*runs.RAY_IN_PROCESS, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reward-model")
    save_tiny_reward_model(directory / "judge")
    rewards = [
        {
            "func": "reward_model",
            "params": {"path": str(directory / "judge"), "batch_size": 3},
            "timeout_s": 60.0,
        },
        {"func": f"{directory / 'reward.py'}:digits", "weight": 0.5, "cache": True},
    ]
    config = runs.write_run(
        directory,
        "run",
        rewards=rewards,
        train={"steps": 6, "max_staleness": 2},
        deterministic=False,
        advantage={"scale": "gdpo"},
        optimizer={"lr": 1e-3},
    )
    process = runs.start(config)
    runs.wait_for_step(process, config, 2)
    runs.kill_worker(config, "reward-model-0")
    runs.finish(process, config)
    return config


def test_the_model_is_replaced_and_no_score_is_lost(finished: Path) -> None:
    (replaced,) = runs.events(finished, "worker_replaced")
    assert replaced["worker"] == "reward-model-0"
    assert not runs.events(finished, "group_lost") and not runs.events(finished, "group_dropped")
    steps = runs.metrics(finished)
    assert runs.steps(finished) == [1, 2, 3, 4, 5, 6]
    # A plain asynchronous run otherwise: its bound holds, and each token has one fate.
    assert max(row["staleness/max"] for row in steps) <= 2
    assert all(row["ledger/unexplained"] == 0 for row in steps)
    for row in steps:
        if "reward" in row:
            assert row["reward/error_frac"] == row["rewards/reward_model/error_frac"] == 0
            assert row["timing/rewards/reward_model_s"] > 0
            assert row["rewards/reward_model/std"] > 0


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    directory = tmp_path_factory.mktemp("pool")
    path = save_tiny_reward_model(directory / "judge")
    reward = {"func": "reward_model", "params": {"path": str(path)}, "timeout_s": 8.0}
    config = load_config(runs.write_run(directory, "pool", rewards=[reward], deterministic=False))
    connection = connect(config)
    yield config
    disconnect(connection)


TEXTS = ["2", "so it is 2", "12+12"]


class Writer:
    """An engine that writes the same texts for every prompt, with the weights of version (0, 0)."""

    version, can_step = Version(0, 0), True

    def __init__(self, *_: Any, **__: Any) -> None:
        self._waiting: list[GroupRequest] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def submit(self, request: GroupRequest) -> None:
        self._waiting.append(request)

    def step(self) -> list[Group]:
        done, self._waiting = self._waiting, []
        return [replace(written(TEXTS), request=request) for request in done]

    def close(self) -> None:
        """Holds nothing."""


def score(pool: RolloutPool, *group_ids: int) -> tuple[list[GroupSummary], list[str]]:
    """The summaries of groups that the pool generates and scores, and its events meanwhile."""
    template = written(TEXTS).request
    for group_id in group_ids:
        pool.submit(replace(template, group_id=group_id))
    summaries: list[GroupSummary] = []
    events: list[str] = []
    deadline = time.monotonic() + 120
    while len(summaries) < len(group_ids):
        assert time.monotonic() < deadline, "they never came"
        done = pool.wait([], 1.0, TrainerState(global_step=0, max_steps=1))
        summaries += [group.summary for group in done.groups]
        events += [kind for kind, _ in done.events]
    return sorted(summaries, key=lambda summary: summary.group_id), events


@pytest.mark.slow
def test_a_model_that_hangs_is_an_errored_score_and_is_replaced(joined: RunConfig) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = RolloutPool(joined, None, {}, Site(local=True), make_engine=Writer)
    pool.start(normal_gap=None)
    try:
        params = RewardModelParams.model_validate(joined.rewards[0].params)
        direct = RewardModel(params)
        expected = direct.score(direct.encode("1 + 1 =", TEXTS)[0])

        (summary,), events = score(pool, 0)
        # fp32; other threads sum in another order.
        assert [score.value for score in summary.scores] == pytest.approx(expected, rel=1e-4)
        assert events == []

        # Stopped, it keeps its connections and answers nothing.
        stopped = pool.pids["reward-model-0"]
        os.kill(stopped, signal.SIGSTOP)
        (summary,), events = score(pool, 1)
        errors = {score.error for score in summary.scores}
        assert errors == {"reward_model: gave no answer within 8 s"}
        assert events == ["worker_replaced"]

        summaries, events = score(pool, *range(2, 6))
        for summary in summaries:
            assert [score.value for score in summary.scores] == pytest.approx(expected, rel=1e-4)
        assert pool.pids["reward-model-0"] not in (0, stopped)

        # Killed between two groups: the next one waits for its successor.
        os.kill(pool.pids["reward-model-0"], signal.SIGKILL)
        (summary,), events = score(pool, 6)
        assert [score.error for score in summary.scores] == [None] * 3
        assert events == ["worker_replaced"]
    finally:
        pool.close()
