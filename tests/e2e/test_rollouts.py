"""The rollout store of a run whose writer and then whose driver is killed, and replays of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from raygrpo.actors.process import spawn
from raygrpo.actors.rollout_writer import RolloutLog
from raygrpo.commands.replay import replay
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.rollouts import files, read_facts, read_step
from raygrpo.types import Fate, FinishedGroup, PlannedSample, StepBatch
from tests import builders, runs
from tests.e2e.head import Head

pytestmark = [*runs.RAY_IN_PROCESS, pytest.mark.usefixtures("shared_ray")]

# Coarse, so that some groups have no signal; and without a value for some completions.
COARSE = '''
def coarse(completions, log_extra, **_):
    """1 for two digits or more; texts of one length have no reward."""
    counts = [sum(c.isdigit() for c in text) for text in completions]
    log_extra("digits", counts)
    return [None if len(t) % 5 == 0 else float(n >= 2) for t, n in zip(completions, counts)]
'''
STEPS = 6
NUM_EVALUATED = 4 * (1 + 3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shared_ray: Head) -> Path:
    """A run whose generator and writer were killed, killed itself after step 4, and resumed."""
    directory = tmp_path_factory.mktemp("rollouts")
    path = runs.write_run(
        directory,
        "killed",
        rewards=[runs.reward(directory, "coarse", COARSE)],
        train={"steps": STEPS, "num_minibatches": 2, "num_iterations": 2},
        eval={"eval_steps": 3, "num_prompts": 4, "num_completions": 3},
        checkpoint={"save_steps": 2, "keep": 0},
    )
    store = runs.run_dir(path) / "completions"
    process = runs.start(path)
    runs.wait_for(process, lambda: bool(files(store, "step")), "the first file")
    (writer,) = _writers(shared_ray.process.pid)
    writer.kill()
    runs.kill_worker(path, "generator-0")
    runs.wait_for(process, lambda: len(runs.events(path, "worker_replaced")) == 2, "two new ones")
    checkpoint = runs.run_dir(path) / "checkpoints" / "step-00000004"
    runs.wait_for(process, checkpoint.is_dir, "checkpoint 4")
    assert set(files(store, "step")) >= {1, 2, 3, 4}, "a checkpoint comes after its files"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    (store / ".tmp-step-00000005.parquet").write_text("half of it")
    runs.run(path)
    return path


def _writers(ancestor: int) -> list[psutil.Process]:
    below = psutil.Process(ancestor).children(recursive=True)
    return [process for process in below if "RolloutWriterActor" in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _frame(config: Path, step: int) -> pandas.DataFrame:
    return pandas.read_parquet(files(runs.run_dir(config) / "completions", "step")[step])


def test_killed_and_resumed_it_equals_the_serial_example_bit_for_bit(config: Path) -> None:
    weights, _ = runs.serial(config)
    runs.assert_same_weights(runs.weights(config), weights)


def test_every_group_is_in_one_file(config: Path) -> None:
    store = runs.run_dir(config) / "completions"
    replaced = {event["worker"] for event in runs.events(config, "worker_replaced")}
    assert replaced == {"generator-0", "rollout-writer"}
    names = [path.name for path in store.iterdir()]
    assert len(names) == STEPS + 3, names
    assert list(files(store, "step")) == list(range(1, STEPS + 1))
    assert list(files(store, "eval")) == [0, 3, 6]
    owners = [sorted(set(_frame(config, step).group_id)) for step in range(1, STEPS + 1)]
    assert list(chain.from_iterable(owners)) == list(range(owners[-1][-1] + 1)), (
        "in order, none twice, none missing"
    )
    for step, path in files(store, "step").items():
        facts = read_facts(path)
        assert (facts.step, facts.complete, facts.num_minibatches) == (step, True, 2)
        assert facts.num_groups == len(owners[step - 1])


def test_files_and_metrics_tell_the_same(config: Path) -> None:
    seen: set[str] = set()
    for row in runs.metrics(config)[1:]:  # the first is the evaluation before step 1
        frame = _frame(config, row["step"])
        assert set(frame.step) == {row["step"]}
        assert frame.group_id.nunique() == row["num_groups"]
        evaluated = NUM_EVALUATED if row["step"] - 1 in (0, 3) else 0  # since the step before
        assert len(frame) + evaluated == row["completions_store/num_rows"]
        assert row["completions_store/num_unstored"] == 0
        assert frame.reward.mean() == pytest.approx(row["reward"], rel=1e-12)
        lengths = frame.token_ids.map(len)
        assert lengths.mean() == pytest.approx(row["completions/mean_length"], rel=1e-12)
        in_step = frame[frame.group_id.isin(frame[frame.fate == "trained"].group_id)]
        assert in_step.reward.mean() == pytest.approx(row["trained/reward"], rel=1e-12)
        trained = frame[frame.fate == "trained"]
        assert set(trained.version_steps.map(list).map(tuple)) == {(row["step"] - 1,)}
        # Token aggregation: each loss token weighs one over all of its minibatch, in fp32 (6e-8).
        for _, part in trained.groupby("minibatch"):
            assert (part.loss_weight * part.num_loss_tokens).sum() == pytest.approx(1.0, rel=1e-6)
            assert sorted(part.position) == list(range(len(part)))
        for digits, text in zip(frame.extras.map(json.loads), frame.completion, strict=True):
            assert digits == {"digits": sum(c.isdigit() for c in text)}
        seen |= set(frame.fate)
    assert seen == {"trained", "masked", "no_signal"}, "the run was to have all of these"


def test_evaluations_are_stored(config: Path) -> None:
    for step, path in files(runs.run_dir(config) / "completions", "eval").items():
        frame = pandas.read_parquet(path)
        assert len(frame) == NUM_EVALUATED
        assert set(frame.stream) == set(frame.fate) == {"eval"}
        assert set(frame.version_steps.map(lambda steps: steps[-1])) == {step}


def test_datasets_reads_the_store(config: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in files(runs.run_dir(config) / "completions", "step").values()]
    loaded = datasets.load_dataset(
        "parquet", data_files=paths, split="train", cache_dir=str(tmp_path)
    )
    frames = pandas.concat([pandas.read_parquet(path) for path in paths])
    assert loaded.num_rows == len(frames)
    assert loaded["completion"][:] == frames.completion.tolist()
    tokens = [list(row) for row in frames.token_ids]
    assert loaded["token_ids"][:] == tokens


def test_a_replay_is_the_run_bit_for_bit(config: Path) -> None:
    root = runs.run_dir(config)
    output = runs.finish(runs.start(root, command="replay"), root)
    assert f"replayed {STEPS} steps" in output
    directory = root / "replay"
    ours = load_file(directory / "model" / "model.safetensors")
    runs.assert_same_weights(runs.weights(config), ours)
    same = ("loss", "grad_norm", "learning_rate", "entropy")
    wanted = [[row[name] for name in same] for row in runs.metrics(config)[1:]]
    found = [[row[name] for name in same] for row in runs.rows(directory / "metrics.jsonl")]
    assert found == wanted


# What follows shares one Ray in this process.


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=8)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_replay_on_two_ranks_differs_by_rounding(
    config: Path, cluster: None, tmp_path: Path
) -> None:
    root, seen = runs.run_dir(config), []
    done = replay(
        root,
        tmp_path / "two",
        steps=2,
        overrides=["--learner.num_ranks=2"],
        on_step=lambda step, metrics: seen.append((step, metrics["loss"], metrics["grad_norm"])),
    )
    assert (done.steps, done.changes) == (2, [])
    wanted = [(row["step"], row["loss"], row["grad_norm"]) for row in runs.metrics(config)[1:3]]
    # fp32 sums in another order: 1e-6 of the gradient's norm. A wrong share of a rank is 10 % off.
    assert np.array(seen) == pytest.approx(np.array(wanted), rel=1e-3, abs=1e-5)
    two = load_file(done.directory / "model" / "model.safetensors")
    one = load_file(root / "checkpoints" / "step-00000002" / "model" / "model.safetensors")
    start = load_file(config.parent / "model" / "model.safetensors")
    moved = sum(float((one[name] - start[name]).abs().sum()) for name in one)
    apart = sum(float((one[name] - two[name]).abs().sum()) for name in one)
    assert 0 < apart < 0.01 * moved
    assert not any(torch.equal(one[name], start[name]) for name in one)


def test_a_foreign_directory_is_left_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="other files"):
        replay(runs.run_dir(config), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_model_that_is_gone_is_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        replay(runs.run_dir(config), tmp_path / "out", overrides=["--model.path=/nowhere"])


class Log(RolloutLog):
    """A store of its own, with what it reported."""

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.samples: list[int] = []
        super().__init__(
            config,
            directory,
            on_event=lambda kind, **fields: self.events.append((kind, fields)),
            on_sample=lambda step, rows: self.samples.append(len(rows)),
        )

    def store(self, step: int, *groups: FinishedGroup) -> None:
        """Writes a step, which trains the kept groups, and waits until all is written."""
        self.take(groups)
        kept = [group.summary.group_id for group in groups if group.fate == "kept"]
        self.write_step(batch(step, *kept))
        self.finish()

    def finish(self) -> None:
        """Waits until all is written."""
        while pendings := self.pendings:
            ready, _ = ray.wait(pendings[0].open_refs, num_returns=1, timeout=120)
            assert ready, "the write never ended"
            if pendings[0].collect(set(ready)):
                self.confirm(pendings[0])


@pytest.fixture
def make_log(cluster: None, tmp_path: Path) -> Iterator[Callable[..., Log]]:
    logs: list[Log] = []

    def make(**completions: Any) -> Log:
        section = {"completions": completions}
        logs.append(Log(tmp_path / "completions", builders.config(tracking=section)))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def decided(group_id: int, fate: Fate = "kept", payload: Any = None) -> FinishedGroup:
    done = [builders.completion([1, 2, 3, 4]), builders.completion([5, 6, 7, 8])]
    group = builders.group(builders.request(group_id), done)
    summary = builders.summary(group_id, [0.0, 1.0])
    payload = ray.put(group) if payload is None else payload
    return FinishedGroup(summary=summary, payload=payload, teaches=True, fate=fate)


def batch(step: int, *group_ids: int) -> StepBatch:
    """The plan of a step that trains the first completion of each group."""
    samples = tuple(
        PlannedSample(
            group_id=group_id,
            completion_index=0,
            prompt_length=3,
            completion_length=4,
            num_loss_tokens=4,
            advantage=1.0,
            loss_weight=0.25,
        )
        for group_id in group_ids
    )
    payloads = dict.fromkeys(group_ids)
    return StepBatch(step=step, minibatches=(samples,), payloads=payloads, versions={})


def test_dropped_groups_are_on_disk_before_their_checkpoint(
    make_log: Callable[..., Log], tmp_path: Path
) -> None:
    log = make_log()
    log.take([decided(0), decided(1, "no_signal"), decided(2)])
    log.write_step(batch(0, 0))
    log.finish()
    log.take([decided(3, "errored")])
    assert log.settled(1)
    log.write_rest("step", 2)
    assert not log.settled(1), "a checkpoint of step 1 counts group 3 as done"
    log.finish()
    assert log.settled(1)
    log.write_step(batch(1, 2))
    log.finish()
    found = files(tmp_path / "completions", "step")
    frames = {step: pandas.read_parquet(path) for step, path in found.items()}
    owners = {step: sorted(set(frame.group_id)) for step, frame in frames.items()}
    assert owners == {1: [0, 1], 2: [2, 3]}
    assert read_step(found[2]).minibatches == batch(1, 2).minibatches
    assert log.samples == [4, 2]
    assert log.metrics() == {"completions_store/num_rows": 8, "completions_store/num_unstored": 0}


def test_no_more_than_two_files_wait(make_log: Callable[..., Log]) -> None:
    log = make_log()
    for step in range(2):
        assert log.has_room
        log.take([decided(step)])
        log.write_step(batch(step, step))
    assert not log.has_room
    log.finish()
    assert log.has_room


def test_a_full_store_takes_no_more(make_log: Callable[..., Log], tmp_path: Path) -> None:
    log = make_log(max_gb=1e-6)  # a kilobyte: less than one file
    for step in range(3):
        log.store(step, decided(step))
    assert list(files(tmp_path / "completions", "step")) == [1]
    assert [kind for kind, _ in log.events] == ["completions_full"]
    assert log.metrics() == {"completions_store/num_rows": 2, "completions_store/num_unstored": 4}


def test_a_store_that_is_off_starts_nothing(make_log: Callable[..., Log], tmp_path: Path) -> None:
    for log in (make_log(frac=0.0), make_log(max_gb=0.0)):
        log.take([decided(0)])
        log.write_step(batch(0, 0))
        assert not log.pendings
        assert log.metrics() == {}
    assert not (tmp_path / "completions").exists()


def test_a_sampled_store_says_that_it_is_partial(
    make_log: Callable[..., Log], tmp_path: Path
) -> None:
    log = make_log(frac=0.5)
    log.store(0, *map(decided, range(20)))
    path = files(tmp_path / "completions", "step")[1]
    assert not read_facts(path).complete
    metrics = log.metrics()
    assert 0 < metrics["completions_store/num_rows"] < 40
    assert sum(metrics.values()) == 40
    assert len(pandas.read_parquet(path)) == metrics["completions_store/num_rows"]


class Owner:
    """Owns an object, which is lost with this process."""

    def put(self) -> list[Any]:
        return [ray.put(np.zeros(1_000_000))]


def _wait_until_lost(ref: Any) -> None:
    """An actor's end, and that of what it owned, takes a moment to be known."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            ray.get(ref, timeout=10)
        except ray.exceptions.ObjectLostError:
            return
        time.sleep(0.05)
    pytest.fail("the object outlives its owner")


class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_what_kills_every_writer_ends_the_run(make_log: Callable[..., Log]) -> None:
    log = make_log()
    with pytest.raises(StorageError, match="4 writers failed at the completions of step 1"):
        log.store(0, decided(0, payload=ray.put(Bomb())))
    assert [kind for kind, _ in log.events] == ["worker_replaced"] * 3


def test_lost_tokens_cost_their_rows_alone(make_log: Callable[..., Log], tmp_path: Path) -> None:
    log = make_log()
    owner = spawn(Owner, num_cpus=0)
    (lost,) = ray.get(owner.put.remote())
    ray.kill(owner)
    _wait_until_lost(lost)
    log.store(0, decided(0, "no_signal", payload=lost), decided(1))
    path = files(tmp_path / "completions", "step")[1]
    assert set(pandas.read_parquet(path).group_id) == {1}
    assert not read_facts(path).complete
    assert log.events == [("completions_lost", {"step": 1, "groups": [0]})]


def test_a_disk_that_cannot_be_written_is_named(
    make_log: Callable[..., Log], tmp_path: Path
) -> None:
    (tmp_path / "completions").write_text("no directory")
    with pytest.raises(StorageError, match=r"cannot write .*step-00000001"):
        make_log().store(0, decided(0))
