"""Whether vLLM works where a run's generators will be."""

from __future__ import annotations

from importlib.util import find_spec

import ray

from raygrpo.actors.cluster.placement import labels_of
from raygrpo.actors.cluster.site import Site
from raygrpo.config import RunConfig
from raygrpo.engines.select import EngineChoice, choose_engine, engine_device
from raygrpo.engines.vllm.options import NOT_INSTALLED, vllm_problem
from raygrpo.errors import InfraError


def settle_engine(config: RunConfig, recorded: str | None, *, local: bool) -> EngineChoice:
    """The engine of a run's generators: vLLM is tried on one of their nodes where that decides.

    ``recorded`` is the engine that a resumed run began with.

    Raises:
        ConfigError: the configuration names another engine than the run began with.
        InfraError: no node answered in time.
    """
    return choose_engine(config, recorded, lambda: _ask(config, local))


def _ask(config: RunConfig, local: bool) -> str | None:
    if find_spec("vllm") is None:  # the run's processes have this one's environment
        return NOT_INSTALLED
    gpus, labels = config.ray.gpus.generator, labels_of(config, "generator")
    options = Site(local=local).options(None, threads=1, gpus=gpus, labels=labels)
    # In a process of its own, so that no other process has vLLM imported.
    probe = ray.remote(max_calls=1)(vllm_problem).options(**options)
    answer = probe.remote(engine_device(config), config.model)
    try:
        problem: str | None = ray.get(answer, timeout=config.ray.timeouts_s.start)
    except ray.exceptions.GetTimeoutError:
        raise InfraError(
            f"vLLM did not import within {config.ray.timeouts_s.start:g} s on a generator's node",
            "name the engine: generators.engine: transformers or vllm",
        ) from None
    return problem
