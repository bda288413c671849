"""What a run asks of a cluster, and each actor's share of threads. Pure: no Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygrpo.config import Gpus, RunConfig, Threads
from raygrpo.errors import ConfigError
from raygrpo.rewards.loading import reward_models


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a run asks for in all."""

    num_processes: int
    num_gpus: float
    gpu_text: str


def demand_of(config: RunConfig) -> Demand:
    """The run's processes (store included) and GPUs."""
    gpus = config.ray.gpus
    parts = [
        ("learner ranks", config.learner.num_ranks, gpus.learner),
        ("generators", config.generators.count, gpus.generator),
    ]
    models = reward_models(config.rewards)
    parts += [(f"reward models ({n})", model.count, model.gpus) for n, model in models.items()]
    return Demand(
        num_processes=sum(count for _, count, _ in parts) + config.scorers.count + 1,
        num_gpus=sum(count * gpus for _, count, gpus in parts),
        gpu_text=" + ".join(f"{count} {what} x {gpus:g}" for what, count, gpus in parts),
    )


def learner_threads(config: RunConfig) -> int:
    """Threads of a learner rank: as set, else its share of this machine's cores.

    On-policy training lets generators and learner take turns, so each side gets all cores;
    otherwise they share them.
    """
    turns = config.train.max_staleness == 0
    sharers = config.learner.num_ranks + (0 if turns else config.generators.count)
    return config.ray.threads.learner or _share(sharers)


def generator_threads(config: RunConfig) -> int:
    """Threads of a generator; see `learner_threads`."""
    turns = config.train.max_staleness == 0
    sharers = config.generators.count + (0 if turns else config.learner.num_ranks)
    return config.ray.threads.generator or _share(sharers)


def _share(num_sharers: int) -> int:
    return max(1, (os.cpu_count() or 1) // num_sharers)


def actor_options(
    *, local: bool, threads: int, gpus: float = 0.0, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Ray options of an actor. On a local cluster of our own, CPUs are shared, not reserved.

    ``labels`` are those of the nodes that may run it (Ray's ``label_selector``). Threads are set
    inside the actors: a runtime environment would cost each a process of its own, beside the ones
    that Ray has started already.
    """
    options: dict[str, Any] = {"num_cpus": 0 if local else threads, "num_gpus": gpus}
    return {**options, "label_selector": dict(labels)} if labels else options


def address_of(config: RunConfig) -> str:
    """``local`` for a Ray of the run's own, else the address of a cluster."""
    address = config.ray.address
    return os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address


def check_local_labels(config: RunConfig) -> None:
    """Raises a ConfigError where labels are asked of a local Ray, whose one node has none."""
    if config.ray.labels:
        raise ConfigError(
            "ray.labels is set, but the run's own local Ray has no labels",
            "set ray.address to a cluster that has them, or ray.labels to {}",
        )


Nodes = Sequence[Mapping[str, Any]]


def nodes_with(nodes: Nodes, labels: Mapping[str, str]) -> Nodes:
    """Those of `ray.nodes()` that these label selectors fit (v, !v, in(v,w) or !in(v,w))."""
    return [
        node
        for node in nodes
        if all(_selects(wanted, node["Labels"].get(key)) for key, wanted in labels.items())
    ]


def _selects(wanted: str, value: str | None) -> bool:
    one_of = wanted.removeprefix("!")
    values = one_of[3:-1].split(",") if one_of.startswith("in(") else [one_of]
    return (value in values) != wanted.startswith("!")


def settle(config: RunConfig, nodes: Nodes) -> RunConfig:
    """The configuration as it holds on a joined cluster: paths absolute, threads known.

    Threads that are not set share the nodes' cores: this machine's say nothing there (in a
    container, not even of itself), and no two actors get the same core, whoever's turn it is.
    """
    sharers = config.learner.num_ranks + config.generators.count
    models = reward_models(config.rewards).values()
    others = config.scorers.count + sum(model.count * model.threads for model in models)
    threads = config.ray.threads.model_dump()
    for role, asked in threads.items():
        cpus = [_has(node, "CPU") for node in nodes_with(nodes, labels_of(config, role))]
        share = (sum(cpus) - others) // sharers
        threads[role] = asked or max(1, int(min(share, min(filter(None, cpus), default=1))))
    run_dir = str(Path(config.run_dir).expanduser().absolute())
    ray = config.ray.model_copy(update={"threads": Threads(**threads)})
    return config.model_copy(update={"run_dir": run_dir, "ray": ray})


def freed(config: RunConfig, *roles: str) -> RunConfig:
    """The configuration of a run in which nothing is reserved for these roles.

    Their counts stay: they decide the others' threads, and so their last bits.
    """
    ray = config.ray
    cut = {
        "labels": {role: wanted for role, wanted in ray.labels.items() if role not in roles},
        "threads": Threads(**{role: 1 if role in roles else n for role, n in ray.threads}),
        "gpus": Gpus(**{role: 0.0 if role in roles else n for role, n in ray.gpus}),
    }
    return config.model_copy(update={"ray": ray.model_copy(update=cut)})


def labels_of(config: RunConfig, role: str) -> dict[str, str]:
    """Labels of the nodes that a role's actors run on."""
    return dict(config.ray.labels).get(role, {})  # type: ignore[call-overload, no-any-return]


def unplaceable(config: RunConfig, nodes: Nodes) -> str:
    """Which role a cluster cannot hold, and why; empty where each and all together fit.

    ``config`` is a settled one, ``nodes`` the living ones of `ray.nodes()`.
    """
    threads, gpus_of = config.ray.threads, config.ray.gpus
    demands = (
        ("learner", config.learner.num_ranks, threads.learner, gpus_of.learner),
        ("generator", config.generators.count, threads.generator, gpus_of.generator),
        ("scorer", config.scorers.count, 1, 0.0),
        *(
            ("reward model", model.count, model.threads, model.gpus)
            for model in reward_models(config.rewards).values()
        ),
    )
    for role, count, cpus, gpus in demands:
        labels = labels_of(config, role)
        where = ", ".join(f"{key}={value}" for key, value in labels.items()) or "without labels"
        fitting = nodes_with(nodes, labels)
        if not fitting:
            return f"no node has the labels of ray.labels.{role} ({where})"
        asked = {"CPU": cpus, "GPU": gpus}
        room = sum(min(_has(n, r) // a for r, a in asked.items() if a) for n in fitting)
        if room < count:
            each = f"{cpus} CPUs and {gpus:g} GPUs"
            return f"{len(fitting)} nodes ({where}) cannot hold {count} {role}s of {each} each"
    text = "CPUs for learner, generators, scorers and reward models"
    reserved = sum(demand[1] * demand[2] for demand in demands)
    present = sum(_has(node, "CPU") for node in nodes)
    return f"the run reserves {reserved} {text}; {present:g} are there" * (reserved > present)


def _has(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))


def check_run_dir(config: RunConfig) -> None:
    """Refuses, in a submitted job, a run directory that would be deleted with the job's copy.

    Raises:
        ConfigError: ``run_dir`` is relative there.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # that is the variable's name
    if in_job and not Path(config.run_dir).expanduser().is_absolute():
        raise ConfigError(
            f"run_dir {config.run_dir!r} is relative: in a submitted job it would lie in the job's "
            "copy of the working directory, which Ray deletes",
            "set run_dir to an absolute path that all nodes share, say --run_dir=/shared/runs/name",
        )


def check_transfer(config: RunConfig) -> None:
    """Refuses ``weights.transport`` where it cannot work.

    Raises:
        ConfigError: this engine or these devices do not have the transport.
    """
    section, gpus = config.generators, config.ray.gpus
    kind = config.weights.transport
    if kind == "store":
        return
    together = gpus.learner * config.learner.num_ranks + gpus.generator * section.count
    problems = {
        "that needs generators.engine: vllm": section.engine != "vllm",
        "that needs CUDA devices: set ray.gpus.learner and ray.gpus.generator": (
            not (gpus.learner and gpus.generator)
        ),
        "nccl needs whole GPUs: set ray.gpus.learner and ray.gpus.generator to 1 or more": (
            kind == "nccl" and min(gpus.learner, gpus.generator) < 1
        ),
        "ipc needs one GPU for a learner of one rank and all generators: set ray.gpus.learner and "
        "ray.gpus.generator to shares of it": (
            kind == "ipc" and (together > 1 or config.learner.num_ranks > 1)
        ),
        "it sends whole weights, not adapters: learner.lora has no use for it": bool(
            config.learner.lora
        ),
        "generators that sleep take no part: set generators.placement: disaggregate": (
            section.placement == "colocate"
        ),
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(
                f"weights.transport is {kind}, but {problem}", "or set weights.transport: store"
            )
