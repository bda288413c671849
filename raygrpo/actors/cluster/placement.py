"""The demand of a run on a cluster, and each actor's share of threads. Pure: no Ray."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raygrpo.config import RunConfig, Threads
from raygrpo.errors import ConfigError
from raygrpo.rewards.loading import reward_models

Nodes = Sequence[Mapping[str, Any]]
Role = Literal["learner", "generator", "scorer"]
Roles = Collection[Role]
ROLES: Roles = ("learner", "generator", "scorer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The processes and GPUs of a run, or of some of its roles.

    Example: ``Demand(num_processes=5, num_gpus=2.0, gpu_text="1 learner ranks x 1 + ...")``.
    """

    num_processes: int
    num_gpus: float
    gpu_text: str


def demand_of(config: RunConfig, roles: Roles = ROLES) -> Demand:
    """Processes (the weight store included) and GPUs of these roles."""
    gpus = config.ray.gpus
    models = reward_models(config.rewards)
    parts = [
        ("learner", "learner ranks", config.learner.num_ranks, gpus.learner),
        ("generator", "generators", config.generators.count, gpus.generator),
        *(("scorer", f"reward models ({n})", m.count, m.gpus) for n, m in models.items()),
    ]
    asked = [part for part in parts if part[0] in roles]
    scorers = config.scorers.count if "scorer" in roles else 0
    return Demand(
        num_processes=sum(count for _, _, count, _ in asked) + scorers + 1,
        num_gpus=sum(count * gpus for _, _, count, gpus in asked),
        gpu_text=" + ".join(f"{count} {what} x {gpus:g}" for _, what, count, gpus in asked),
    )


def local_threads(config: RunConfig, cores: int) -> Threads:
    """Threads of the actors on one machine: as set, else a share of its cores.

    On-policy training lets generators and learner take turns, so each side gets all cores. In
    asynchronous training they share the cores.
    """
    asked, ranks, count = config.ray.threads, config.learner.num_ranks, config.generators.count
    if config.train.max_staleness:
        ranks = count = ranks + count
    return Threads(
        learner=asked.learner or max(1, cores // ranks),
        generator=asked.generator or max(1, cores // count),
    )


def address_of(config: RunConfig) -> str:
    """``local`` for a Ray of the run's own, else the address of a cluster."""
    address = config.ray.address
    return os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address


def check_local_labels(config: RunConfig, roles: Roles = ROLES) -> None:
    """Raises a ConfigError where labels are asked of a local Ray, whose one node has none."""
    if any(role in roles for role in config.ray.labels):
        raise ConfigError(
            "ray.labels is set, but the run's own local Ray has no labels",
            "set ray.address to a cluster that has them, or ray.labels to {}",
        )


def nodes_with(nodes: Nodes, labels: Mapping[str, str]) -> Nodes:
    """The nodes of `ray.nodes()` whose labels fit these selectors (v, !v, in(v,w) or !in(v,w))."""
    return [
        node
        for node in nodes
        if all(_selects(wanted, node["Labels"].get(key)) for key, wanted in labels.items())
    ]


def _selects(wanted: str, value: str | None) -> bool:
    one_of = wanted.removeprefix("!")
    values = one_of[3:-1].split(",") if one_of.startswith("in(") else [one_of]
    return (value in values) != wanted.startswith("!")


def cluster_threads(config: RunConfig, nodes: Nodes) -> Threads:
    """Threads of the actors on a joined cluster: as set, else a share of the nodes' cores.

    The driver's own cores do not count: the driver may be in a container, or run no actor. No two
    actors get the same core, in on-policy training neither.
    """
    sharers = config.learner.num_ranks + config.generators.count
    models = reward_models(config.rewards).values()
    others = config.scorers.count + sum(model.count * model.threads for model in models)
    threads = config.ray.threads.model_dump()
    for role, asked in threads.items():
        cpus = [_has(node, "CPU") for node in nodes_with(nodes, labels_of(config, role))]
        share = (sum(cpus) - others) // sharers
        threads[role] = asked or max(1, int(min(share, min(filter(None, cpus), default=1))))
    return Threads(**threads)


def labels_of(config: RunConfig, role: str) -> dict[str, str]:
    """Labels of the nodes that a role's actors run on."""
    return dict(config.ray.labels).get(role, {})  # type: ignore[call-overload, no-any-return]


def unplaceable(config: RunConfig, nodes: Nodes, roles: Roles = ROLES) -> str:
    """Which of the roles a cluster cannot hold, and why; empty where they fit, each and together.

    ``nodes`` are the living ones of `ray.nodes()`.
    """
    threads, gpus_of = cluster_threads(config, nodes), config.ray.gpus
    everyone = (
        ("learner", config.learner.num_ranks, threads.learner, gpus_of.learner),
        ("generator", config.generators.count, threads.generator, gpus_of.generator),
        ("scorer", config.scorers.count, 1, 0.0),
        *(
            ("reward model", model.count, model.threads, model.gpus)
            for model in reward_models(config.rewards).values()
        ),
    )
    # Reward models serve the scorers.
    demands = [d for d in everyone if ("scorer" if d[0] == "reward model" else d[0]) in roles]
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
