"""The second step of a configuration: what only the cluster can say is filled in. Pure.

`resolve` runs once. Its configuration is the one that every actor, the trainer and the tracker
read, and that ``config.resolved.yaml`` holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from raygrpo.actors.cluster.placement import Nodes, cluster_threads, local_threads
from raygrpo.config import RunConfig
from raygrpo.engines.select import EngineChoice, planned_engine
from raygrpo.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the place of a run says about itself.

    Example: a laptop is ``Facts(local=True, cores=8, engine=EngineChoice(engine="transformers",
    reason="configured"))``.

    Attributes:
        local: whether the run has a Ray of its own on this machine.
        cores: CPU cores of this machine.
        engine: the generators' engine, and why it is that one.
        nodes: the living nodes of a joined cluster, as `ray.nodes` lists them.
    """

    local: bool
    cores: int
    engine: EngineChoice
    nodes: Nodes = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The one configuration of a run.

    Threads of all actors are set, the engine is named, and the run directory is absolute.
    """

    config: RunConfig
    facts: Facts


def resolve(config: RunConfig, facts: Facts) -> Resolved:
    """Completes a checked configuration."""
    if facts.local:
        threads = local_threads(config, facts.cores)
    else:
        threads = cluster_threads(config, facts.nodes)
    engine = config.generators.model_copy(update={"engine": facts.engine.engine})
    whole = {
        "run_dir": str(RunDir.at(config).root),
        "generators": engine,
        "ray": config.ray.model_copy(update={"threads": threads}),
    }
    return Resolved(config=config.model_copy(update=whole), facts=facts)


def this_machine(config: RunConfig) -> Facts:
    """The facts of a run on this machine alone; vLLM is not tried."""
    return Facts(local=True, cores=os.cpu_count() or 1, engine=planned_engine(config))
