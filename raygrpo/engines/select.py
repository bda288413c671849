"""Chooses the engine of a run's generators, and makes it. Importing this module imports no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.engines.vllm.options import NOT_INSTALLED, OURS, is_installed, vllm_problem
from raygrpo.errors import ConfigError
from raygrpo.types import Version

EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """The engine of a run, and the reason for it, such as ``vLLM is not installed``."""

    engine: EngineName
    reason: str


def check_engine(config: RunConfig) -> None:
    """Refuses an engine or options that cannot work, without a generator.

    Raises:
        ConfigError: the engine cannot keep the promise of ``deterministic``, or takes no such
            option.
    """
    section = config.generators
    if config.deterministic and section.engine == "vllm":
        raise ConfigError(
            "deterministic: true needs generators.engine: transformers: vLLM batches groups, and "
            "its last bits depend on what else is in the batch",
            "change one of the two",
        )
    if section.options and section.engine == "transformers":
        raise ConfigError(
            "generators.options are vLLM's, but generators.engine is transformers",
            "remove them, or set generators.engine: vllm",
        )
    if refused := sorted(OURS & set(section.options)):
        raise ConfigError(
            f"generators.options may not set {', '.join(refused)}: the project does",
            "remove them (max_num_seqs follows max_rows; the model is the section model)",
        )
    wanted = section.options.get("tensor_parallel_size", 1)
    if section.engine == "vllm" and 0 < config.ray.gpus.generator < wanted:
        raise ConfigError(
            f"generators.options.tensor_parallel_size is {wanted}, but a generator has "
            f"{config.ray.gpus.generator:g} GPUs",
            f"set ray.gpus.generator to {wanted}",
        )


def choose_engine(
    config: RunConfig, recorded: str | None, why_not_vllm: Callable[[], str | None]
) -> EngineChoice:
    """The engine of a run: the configured one, else the one it began with, else vLLM if that works.

    Args:
        recorded: the engine of the run's steps so far; None for a new run.
        why_not_vllm: asked last, on a node of the generators; None if vLLM works there.

    Raises:
        ConfigError: the configuration names another engine than the run began with.
    """
    named = config.generators.engine
    if recorded is not None and named not in ("auto", recorded):
        raise ConfigError(
            f"this run began with the engine {recorded}, but generators.engine is {named}: "
            "their kernels differ, so the run would not be one experiment",
            f"set generators.engine to {recorded} or auto, or set another run_dir",
        )
    if named != "auto":
        return EngineChoice(engine=named, reason="configured")
    if recorded is not None:
        return EngineChoice(
            engine="vllm" if recorded == "vllm" else "transformers", reason="the run began with it"
        )
    if config.deterministic:
        return EngineChoice(engine="transformers", reason="deterministic: true")
    problem = why_not_vllm()
    if problem is None:
        return EngineChoice(engine="vllm", reason="vLLM is installed and loads")
    return EngineChoice(engine="transformers", reason=problem)


def planned_engine(config: RunConfig) -> EngineChoice:
    """The engine of a run that has not started; vLLM is not tried."""
    problem = None if is_installed() else NOT_INSTALLED
    choice = choose_engine(config, None, lambda: problem)
    if choice.engine == "vllm":
        return EngineChoice(engine="vllm", reason="tried when the run starts")
    return choice


def engine_device(config: RunConfig) -> str:
    """The device of a generator: ``cuda`` or ``cpu``."""
    return "cuda" if config.ray.gpus.generator else "cpu"


def make_engine(config: RunConfig, *, threads: int, version: Version | None) -> Engine:
    """The engine of a generator in this process; ``version`` as in the engines.

    Raises:
        ConfigError: the engine cannot be used here, or its model or options are wrong.
    """
    section, device = config.generators, engine_device(config)
    choice = choose_engine(config, None, lambda: vllm_problem(device))
    if choice.engine == "vllm":
        if problem := vllm_problem(device):
            raise ConfigError(
                f"generators.engine is vllm, but {problem}",
                "install the extra vllm (docs/engines.md), or set generators.engine: transformers",
            )
        # It imports vLLM, which only a run that uses it has installed.
        from raygrpo.engines.vllm.engine import VllmEngine

        colocated = section.placement == "colocate" and device != "cpu"
        return VllmEngine(
            config.model,
            seed=config.seed,
            # A larger group is decoded whole.
            max_rows=max(section.max_rows, config.sampling.num_completions),
            device=device,
            options={**({"enable_sleep_mode": True} if colocated else {}), **section.options},
            transport=config.weights.transport,
            version=version,
        )
    # torch stays out of processes that only choose.
    import torch

    from raygrpo.engines.hf.engine import TransformersEngine

    torch.set_num_threads(threads)
    return TransformersEngine(
        config.model,
        seed=config.seed,
        max_rows=section.max_rows,
        deterministic=config.deterministic,
        device=device,
        version=version,
    )
