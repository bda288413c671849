"""Reward models in actors of their own: killed in a run, stopped, killed between two calls."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from raygrpo.actors.cluster.connect import connect, disconnect
from raygrpo.actors.cluster.placement import demand_of
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.scorer import ScoreReport
from raygrpo.actors.weight_store import start_store
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.rewards.contract import TrainerState
from raygrpo.rewards.params import RewardModelParams
from raygrpo.rewards.reward_model import RewardModel
from raygrpo.types import Group
from tests import runs
from tests.faults.test_reward_children import make_group
from tests.tiny_reward import save_tiny_reward_model

pytestmark = runs.RAY_IN_PROCESS


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
    runs.wait_for(process, lambda: len(runs.metrics(config)) >= 2, "the second step")
    (started,) = runs.events(config, "started")
    os.kill(started["pids"]["reward-model-0"], signal.SIGKILL)
    runs.finish(process, config)
    return config


def test_the_model_is_replaced_and_no_score_is_lost(finished: Path) -> None:
    (replaced,) = runs.events(finished, "worker_replaced")
    assert replaced["worker"] == "reward-model-0"
    assert not runs.events(finished, "group_lost") and not runs.events(finished, "group_dropped")
    steps = runs.metrics(finished)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
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
    connection = connect(config, demand_of(config))
    yield config
    disconnect(connection)


def score(pool: RolloutPool, *groups: Group) -> list[ScoreReport]:
    """Scores groups that exist already; collects the pool's events in order."""
    for group in groups:
        pool.submit(group)
    reports: list[ScoreReport] = []
    deadline = time.monotonic() + 120
    while len(reports) < len(groups):
        assert time.monotonic() < deadline, "they never came"
        done = pool.wait([], 1.0)
        reports += [report for _, report in done.groups]
        EVENTS.extend(kind for kind, _ in done.events)
    return sorted(reports, key=lambda report: report.summary.group_id)


EVENTS: list[str] = []


def numbered(group_id: int, texts: Sequence[str]) -> Group:
    group = make_group(texts)
    return replace(group, request=replace(group.request, group_id=group_id))


@pytest.mark.slow
def test_a_model_that_hangs_is_an_errored_score_and_is_replaced(joined: RunConfig) -> None:
    store = start_store()
    pool = RolloutPool(joined, store, joined.rewards, {}, local=True)
    pool.trainer_state = TrainerState(global_step=0, max_steps=1)
    pool.start()
    try:
        params = RewardModelParams.model_validate(joined.rewards[0].params)
        direct = RewardModel(params)
        texts = ["2", "so it is 2", "12+12"]
        expected = direct.score(direct.encode("1 + 1 =", texts)[0])

        (report,) = score(pool, numbered(0, texts))
        got = [score.value for score in report.summary.scores]
        # fp32; other threads sum in another order.
        assert got == pytest.approx(expected, rel=1e-4) and EVENTS == []

        # Stopped, it keeps its connections and answers nothing.
        stopped = pool.pids["reward-model-0"]
        os.kill(stopped, signal.SIGSTOP)
        (report,) = score(pool, numbered(1, texts))
        errors = {score.error for score in report.summary.scores}
        assert errors == {"reward_model: gave no answer within 8 s"}
        assert EVENTS == ["worker_replaced"] and report.late == ("reward_model",)

        reports = score(pool, *(numbered(n, texts) for n in range(2, 6)))
        for report in reports:
            got = [score.value for score in report.summary.scores]
            assert got == pytest.approx(expected, rel=1e-4)
        assert pool.pids["reward-model-0"] not in (0, stopped)

        # Killed between two groups: the next one waits for its successor.
        os.kill(pool.pids["reward-model-0"], signal.SIGKILL)
        (report,) = score(pool, numbered(6, texts))
        assert [s.error for s in report.summary.scores] == [None] * 3
        assert EVENTS == ["worker_replaced"] * 2
    finally:
        pool.close()
        store.close()
