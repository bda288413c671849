"""Generators beside learner ranks, on GPUs that the cluster only declares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from raygrpo.actors import learner
from raygrpo.actors.cluster.colocation import Colocation, bundles_of
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.pool import factory
from raygrpo.actors.process import spawn
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from tests import builders, runs

pytestmark = runs.RAY_IN_PROCESS


def config(count: int = 2, ranks: int = 2, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "generators": {"count": count, "placement": "colocate"},
        "learner": {"num_ranks": ranks},
        "ray": {"gpus": {"learner": 0.6, "generator": 0.4}, "timeouts_s": {"start": 5}},
    }
    return builders.config(**{**base, **sections})


class Where:
    """Stands where a learner rank or a generator would, and says which devices it was given."""

    def start(self, *_: Any) -> int:
        return os.getpid()

    def look(self) -> tuple[list[int], int]:
        return ray.get_gpu_ids(), os.getpid()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def stand_in(_: type, *arguments: Any, **options: Any) -> Any:
    """What `spawn` does, for `Where` in place of the actor that was asked for."""
    options.pop("max_concurrency", None)
    return spawn(Where, **options)


def test_a_rank_and_its_generator_share_a_gpu(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config()
    places = Colocation(run, local=True)
    monkeypatch.setattr(learner, "spawn", stand_in)
    monkeypatch.setattr(factory, "spawn", stand_in)
    site = Site(local=True, places=places)
    ranks = learner.LearnerGroup(run, None, site)._actors
    generators = factory.WorkerFactory(run, None, {}, site)
    actors = {
        **{("learner", rank): actor for rank, actor in enumerate(ranks)},
        **{("generator", i): worker.actor for i, worker in enumerate(generators.all("generator"))},
    }
    seen = {key: ray.get(actor.look.remote(), timeout=60) for key, actor in actors.items()}
    devices = {key: gpus for key, (gpus, _) in seen.items()}
    assert all(len(gpus) == 1 for gpus in devices.values())
    for index in range(2):
        assert devices["learner", index] == devices["generator", index]
    assert devices["learner", 0] != devices["learner", 1]
    assert len({pid for _, pid in seen.values()}) == 4
    with pytest.raises(ConfigError, match="no nodes have room"):
        Colocation(run, local=True)  # both GPUs are taken
    for actor in actors.values():
        ray.kill(actor)
    places.close()
    Colocation(run, local=True).close()  # and given back


def test_bundles_are_what_a_rank_and_its_generators_ask_for() -> None:
    cpu = {"threads": {"learner": 2, "generator": 1}}
    assert bundles_of(config(), local=True) == [{"GPU": 1.0}, {"GPU": 1.0}]
    three = config(3, ray={"gpus": {"learner": 0.5, "generator": 0.25}, **cpu})
    assert bundles_of(three, local=False) == [{"GPU": 1.0, "CPU": 4.0}, {"GPU": 0.75, "CPU": 3.0}]
    assert bundles_of(config(ray=cpu), local=True) == []
    assert bundles_of(config(ray=cpu), local=False) == [{"CPU": 3.0}, {"CPU": 3.0}]
    apart = config(generators={"count": 2})
    assert bundles_of(apart, local=False) == []
