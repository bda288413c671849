"""The pool with real Ray actors whose processes are killed at chosen moments."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raygrpo.actors.cluster.connect import connect, disconnect
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.futures import resolve
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.pool.workers import PoolEvents
from raygrpo.actors.weight_store import StoreHandle, start_store
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, InfraError
from raygrpo.models import load_model
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import GroupRequest, Sampling, Version
from raygrpo.weights.publisher import Publisher
from tests import builders, runs

pytestmark = runs.RAY_IN_PROCESS

GATED = '''
import pathlib, time

def gated(completions, gate, **_):
    """Answers once the gate file is there; says that it was asked."""
    pathlib.Path(gate + ".asked").touch()
    while not pathlib.Path(gate).exists():
        time.sleep(0.01)
    return [float(len(text)) for text in completions]
'''


@dataclass
class Cluster:
    config: RunConfig
    store: StoreHandle
    pool: RolloutPool
    gate: Path

    def publish(self, version: Version) -> None:
        """Publishes the model's own weights, as a learner would."""
        model = load_model(self.config.model, seed=0, dtype=torch.float32)
        Publisher(self.store, local=True).publish(version, model.named_parameters())

    def wait(self) -> PoolEvents:
        return self.pool.wait([], 1.0, TrainerState(global_step=0, max_steps=1))

    def wait_until(self, condition: Callable[[PoolEvents], bool]) -> list[PoolEvents]:
        """Waits of the pool until one brings what is asked for."""
        deadline, seen = time.monotonic() + 120, []
        while True:
            seen.append(self.wait())
            if condition(seen[-1]):
                return seen
            assert time.monotonic() < deadline, "it never came"


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    directory = tmp_path_factory.mktemp("pool")
    gated = {**runs.reward(directory, "gated", GATED), "params": {"gate": str(directory / "gate")}}
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = load_config(runs.write_run(directory, "pool", rewards=[gated], deterministic=False))
    connection = connect(config)
    yield config
    disconnect(connection)


@pytest.fixture
def cluster(joined: RunConfig) -> Iterator[Cluster]:
    store = start_store()
    gate = Path(joined.rewards[0].params["gate"])
    gate.touch()
    pool = RolloutPool(joined, store, {}, Site(local=True))
    pool.start(normal_gap=None)
    yield Cluster(config=joined, store=store, pool=pool, gate=gate)
    pool.close()
    store.close()


def order(group_id: int, version: Version) -> GroupRequest:
    made = builders.request(group_id, tokens=(5, 6, 7), max_tokens=4)
    return replace(made, min_version=version)


def test_a_dead_scorer_costs_no_generation(cluster: Cluster) -> None:
    pool, first = cluster.pool, Version(1, 0)
    asked = Path(f"{cluster.gate}.asked")
    asked.unlink(missing_ok=True)
    cluster.gate.unlink()
    cluster.publish(first)
    pool.load()
    pool.submit(order(3, first))
    cluster.wait_until(lambda _: asked.exists())
    os.kill(pool.pids["scorer-0"], signal.SIGKILL)
    seen = cluster.wait_until(lambda d: any(kind == "worker_replaced" for kind, _ in d.events))
    assert not any(d.lost for d in seen), "the payload is the driver's: nothing is generated again"
    cluster.gate.touch()
    (group,) = cluster.wait_until(lambda d: bool(d.groups))[-1].groups
    assert group.summary.attempt == 0
    assert all(score.value is not None for score in group.summary.scores)
    assert len(ray.get(group.payload).completions) == 2


def test_more_gpus_than_the_cluster_has_are_refused(joined: RunConfig) -> None:
    gpus = joined.ray.gpus.model_copy(update={"generator": 4.0})
    config = joined.model_copy(update={"ray": joined.ray.model_copy(update={"gpus": gpus})})
    with pytest.raises(ConfigError, match=r"asks for 4 GPUs[^;]*; the cluster has 0[^~]*ray\.gpus"):
        connect(config)


def test_deltas_leave_an_engine_with_the_learners_very_bits(cluster: Cluster) -> None:
    pool = cluster.pool
    model = load_model(cluster.config.model, seed=0, dtype=torch.float32)
    publisher = Publisher(cluster.store, local=True)
    kinds = []
    for step in (2, 3, 4):
        change_bits(model, seed=step, frac=0.002)
        publisher.publish(Version(1, step), model.named_parameters())
        pool.load()
        kinds.append(cluster.wait_until(lambda d: bool(d.loads))[-1].loads[0].kind)
    assert kinds == ["full", "delta", "delta"]
    held = resolve(pool.generators[0].actor.__ray_call__.remote(tensors_of), "generator")
    assert held == {name: bytes_of(tensor) for name, tensor in model.named_parameters()}


def change_bits(model: torch.nn.Module, *, seed: int, frac: float) -> None:
    """Flips the lowest bit of a share of all weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        chosen = torch.rand(parameter.shape, generator=generator) < frac
        parameter.data.view(torch.int32)[chosen] ^= 1


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


def tensors_of(generator: Any) -> dict[str, bytes]:
    """The tensors that a generator's engine computes with; runs in its process."""
    return {name: bytes_of(tensor) for name, tensor in generator.engine.weights.targets.items()}


def test_a_generator_that_is_told_to_end_hands_on_what_it_wrote(cluster: Cluster) -> None:
    pool, before, after = cluster.pool, Version(1, 0), Version(1, 1)
    cluster.publish(before)
    pool.load()
    length = 500  # a second or more; the short group is written in its first four steps
    sampling = Sampling(num_completions=8, max_tokens=length, min_tokens=length)
    pool.submit(replace(order(0, before), sampling=sampling))
    pool.submit(order(1, before))
    cluster.wait_until(lambda d: bool(d.groups))
    os.kill(pool.pids["generator-0"], signal.SIGTERM)
    cluster.publish(after)  # only the generator that comes in its place loads it
    seen = cluster.wait_until(lambda d: any(g.summary.group_id == 0 for g in d.groups))
    assert [(kind, fields.get("groups")) for done in seen for kind, fields in done.events] == [
        ("worker_leaving", 0),
        ("worker_replaced", []),
    ]
    assert not any(done.lost or done.aborted_tokens for done in seen)
    (group,) = (g for done in seen for g in done.groups if g.summary.group_id == 0)
    assert group.summary.attempt == 0
    for completion in ray.get(group.payload).completions:
        (old, kept), (new, written) = completion.version_runs
        assert (old, new, kept + written) == (before, after, length)
        assert 4 <= kept < length


def test_a_dead_store_is_not_the_generators_fault(cluster: Cluster) -> None:
    cluster.store.close()
    cluster.pool.load()
    with pytest.raises(InfraError, match="lost a process that it needs"):
        cluster.wait_until(lambda d: bool(d.events))
