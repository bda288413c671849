"""What a run asks of a cluster, and each actor's share of threads. Pure: no Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from raygrpo.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a run asks for in all."""

    num_processes: int
    num_gpus: float
    gpu_text: str


def demand_of(config: RunConfig) -> Demand:
    """The run's processes (store included) and GPUs."""
    learner, generators = config.learner, config.generators
    return Demand(
        num_processes=learner.num_ranks + generators.count + config.scorers.count + 1,
        num_gpus=learner.num_ranks * learner.gpus_per_rank + generators.count * generators.gpus,
        gpu_text=(
            f"{learner.num_ranks} learner ranks x {learner.gpus_per_rank:g} + "
            f"{generators.count} generators x {generators.gpus:g}"
        ),
    )


def learner_threads(config: RunConfig) -> int:
    """Threads of a learner rank: as set, else its share of this machine's cores.

    On-policy training lets generators and learner take turns, so each side gets all cores;
    otherwise they share them.
    """
    turns = config.train.max_staleness == 0
    sharers = config.learner.num_ranks + (0 if turns else config.generators.count)
    return config.learner.threads or _share(sharers)


def generator_threads(config: RunConfig) -> int:
    """Threads of a generator; see `learner_threads`."""
    turns = config.train.max_staleness == 0
    sharers = config.generators.count + (0 if turns else config.learner.num_ranks)
    return config.generators.threads or _share(sharers)


def _share(num_sharers: int) -> int:
    return max(1, (os.cpu_count() or 1) // num_sharers)


def actor_options(*, local: bool, threads: int, gpus: float = 0.0) -> dict[str, Any]:
    """Ray options of an actor. On a local cluster of our own, CPUs are shared, not reserved.

    Threads are set inside the actors: a runtime environment would cost each a process of its own,
    beside the ones that Ray has started already.
    """
    return {
        "num_cpus": 0 if local else threads,
        "num_gpus": gpus,
    }
