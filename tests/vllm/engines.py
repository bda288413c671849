"""What the tests of the vLLM engine share: engines, requests, and transformers as the reference."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from raygrpo.config import ModelSection
from raygrpo.engines.select import make_engine
from raygrpo.models import load_model
from raygrpo.types import ByteArray, Completion, Group, GroupRequest, Version
from raygrpo.weights.buckets import make_version, weight_targets
from raygrpo.weights.types import WeightsManifest
from tests import builders

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "weights" / "smollm2-135m"
ECHO = ROOT / "examples" / "echo" / "model"
SEED = 5
FIRST = Version(0, 0)
STEP_DEADLINE = 60.0
_group_ids = itertools.count()


def start(path: Path, tensor_parallel_size: int = 1, **model: Any) -> Any:
    """An engine as a generator makes it, in float32, on the weights of ``path`` as (0, 0).

    One thread: two of vLLM's and two of the reference's would spin against each other.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # as a generator's constructor does
    torch.set_num_threads(1)
    options: dict[str, Any] = {
        "max_model_len": 512 if path == SMOLLM2 else 64,
        "kv_cache_memory_bytes": 2**29,
    }
    if tensor_parallel_size > 1:
        options["tensor_parallel_size"] = tensor_parallel_size
    config = builders.config(
        seed=SEED,
        model={"path": str(path), "dtype": "float32", **model},
        generators={"engine": "vllm", "max_rows": 16, "options": options},
    )
    return make_engine(config, threads=1, version=FIRST)


def publish(model: Any, version: Version) -> tuple[WeightsManifest, list[ByteArray]]:
    """Buckets of a model, as a learner publishes them."""
    return make_version(version, weight_targets(model).items())


def perturbed(model: Any, seed: int, only: str = "") -> Any:
    """``model`` with other weights, in place: those whose names hold ``only``."""
    noise = torch.randn(9973, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if only in name:
                repeats = -(-tensor.numel() // noise.numel())
                tensor *= 1 + 0.1 * noise.repeat(repeats)[: tensor.numel()].view(tensor.shape)
    return model


def request(ids: Any, *, min_version: Version = FIRST, **sampling: Any) -> GroupRequest:
    """A group of its own of a prompt; 3 completions of 12 tokens unless said otherwise."""
    settings: dict[str, Any] = {"num_completions": 3, "max_tokens": 12, **sampling}
    order = builders.request(next(_group_ids), tokens=ids, **settings)
    return replace(order, seed=SEED, min_version=min_version)


def drawn_model() -> Any:
    """The embedded example's model in transformers, drawn as the run's seed draws it."""
    section = ModelSection(path=str(ECHO), random_init=True)
    return load_model(section, seed=SEED, dtype=torch.float32).eval()


def vllm_processes(pid: int | None = None) -> list[psutil.Process]:
    """The processes of vLLM under a process, such as VLLM::EngineCore; under this one if None."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if child.name().startswith("VLLM::")]


def drain(engine: Any) -> Iterator[Group]:
    """Groups as they finish, until all have."""
    while engine.num_unfinished:
        assert engine.can_step
        yield from engine.step()


def run(engine: Any, item: GroupRequest) -> tuple[Completion, ...]:
    """A request's completions."""
    engine.submit(item)
    (group,) = drain(engine)
    assert group.request == replace(item, partials=())
    return group.completions


def step_until(engine: Any, tokens: int) -> None:
    """Steps until some request has that many tokens; they are counted where vLLM keeps them."""
    states = engine._client._llm.output_processor.request_states
    while not any(
        state.detokenizer.num_output_tokens() >= tokens for state in list(states.values())
    ):
        assert not engine.step(), "finished before it had so many tokens"


def plain(path: Path) -> Any:
    """The model in transformers, in float32."""
    return load_model(ModelSection(path=str(path)), seed=SEED, dtype=torch.float32).eval()
