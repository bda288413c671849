"""The checks of `gpu_check.py` on engines."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_cases import (
    KINDS,
    Check,
    largest_gap,
    load,
    make_request,
    policy_scores,
)
from raygrpo.config import ModelSection
from raygrpo.types import Group, GroupRequest, Version
from raygrpo.weights.types import WeightsManifest

ENGINE_GAP = 1e-3  # the tolerance of the probe after a weight sync


def published(policy: Any, step: int) -> tuple[WeightsManifest, list[Any]]:
    """A policy's weights as a version."""
    from raygrpo.weights.buckets import make_version

    named = [(name, p.detach()) for name, p in policy.model.named_parameters()]
    return make_version(Version(0, step), named)


def generate(engine: Any, requests: Sequence[GroupRequest]) -> dict[int, Group]:
    """All groups, to their ends."""
    for request in requests:
        engine.submit(request)
    found: dict[int, Group] = {}
    while engine.num_unfinished:
        found |= {group.request.group_id: group for group in engine.step()}
    return dict(sorted(found.items()))


def requests_for(
    vocabulary: int, new_tokens: int, count: int = 4, *, exactly: bool = False
) -> list[GroupRequest]:
    """Four prompts of different lengths."""
    random = np.random.default_rng(2)
    prompts = [random.integers(3, vocabulary, length).tolist() for length in (5, 9, 17, 30)]
    return [
        make_request(i, prompt, count, new_tokens, exactly=exactly)
        for i, prompt in enumerate(prompts)
    ]


def engine_gap(groups: Mapping[int, Group], policy: Any, device: str) -> float:
    """Between the logprobs that an engine reported and the policy's."""
    with torch.no_grad():
        scores, _ = policy_scores(policy, groups, "plain", device)
    reported = {
        (group_id, index): torch.from_numpy(completion.logprobs)
        for group_id, group in groups.items()
        for index, completion in enumerate(group.completions)
    }
    return largest_gap(scores, reported)


def same_tokens(one: Mapping[int, Group], other: Mapping[int, Group]) -> bool:
    """Whether two runs wrote the same."""
    return all(
        np.array_equal(a.token_ids, b.token_ids)
        for group_id in one
        for a, b in zip(one[group_id].completions, other[group_id].completions, strict=True)
    )


def transformers_engine(section: ModelSection, device: str) -> Any:
    """An engine for 32 completions that serves the weights on disk."""
    from raygrpo.engines.hf.engine import TransformersEngine

    settings: dict[str, Any] = {"seed": 0, "max_rows": 32, "deterministic": False}
    return TransformersEngine(section, device=device, version=Version(0, 0), **settings)


def check_engine(options: argparse.Namespace, directory: Path) -> Iterator[Check]:
    """The transformers engine, and weights that land while it decodes."""
    from tests.tiny import save_tiny_model

    device = options.device
    for kind in KINDS:
        path = save_tiny_model(directory / f"engine-{kind}", kind)  # type: ignore[arg-type]
        section = ModelSection(path=str(path), dtype="float32")
        engine = transformers_engine(section, device)
        requests = requests_for(60, 12)
        first, second = generate(engine, requests), generate(engine, requests)
        policies = [load(path), *(load(path, random_seed=seed) for seed in (1, 2))]
        for policy in policies:
            policy.to(device)
        gap = engine_gap(first, policies[0], device)
        yield Check.most(f"engine {kind}: logprobs against the learner's", gap, ENGINE_GAP)
        yield Check.true(f"engine {kind}: sampling repeats itself", same_tokens(first, second))
        for step in (1, 2):
            yield from check_swap(f"engine {kind}, swap {step}", engine, policies, step, device)
        engine.close()
    yield from engine_speed(options, directory)


def check_swap(
    name: str, engine: Any, policies: Sequence[Any], step: int, device: str
) -> Iterator[Check]:
    """Stages a version on a thread while the engine decodes, and puts it into use between steps."""
    (request, *_) = requests_for(60, 24, exactly=True)
    engine.submit(request)
    manifest, buckets = published(policies[step], step)
    stager = threading.Thread(target=engine.stage_weights, args=(manifest, buckets))
    for _ in range(6):
        engine.step()
    stager.start()
    for _ in range(6):
        engine.step()
    stager.join()
    start = time.perf_counter()
    engine.commit_weights()
    yield Check(name=f"{name}: seconds", value=f"{time.perf_counter() - start:.4f}")
    (group,) = generate(engine, ()).values()
    runs = [c.version_runs for c in group.completions]
    wanted = [(Version(0, step - 1), 12), (Version(0, step), 12)]
    yield Check.true(f"{name}: both versions", all(list(run) == wanted for run in runs))
    after = generate(engine, requests_for(60, 12))
    gap = engine_gap(after, policies[step], device)
    yield Check.most(f"{name}: logprobs against the learner's", gap, ENGINE_GAP)


def engine_speed(options: argparse.Namespace, directory: Path) -> Iterator[Check]:
    """Tokens per second in bf16, of the second of two rounds."""
    from benchmarks.shapes import save_shape

    shape = "0.5b" if options.device == "cuda" and not options.quick else "tiny"
    path = save_shape(shape, directory / f"speed-{shape}")
    section = ModelSection(path=str(path), dtype="bfloat16")
    engine = transformers_engine(section, options.device)
    requests = requests_for(60, 64, count=8, exactly=True)
    generate(engine, requests)
    start = time.perf_counter()
    groups = generate(engine, requests)
    seconds = time.perf_counter() - start
    tokens = sum(c.token_ids.size for group in groups.values() for c in group.completions)
    yield Check(name=f"engine {shape} bf16: tokens/s", value=f"{tokens / seconds:.0f}")
    engine.close()


def check_vllm(options: argparse.Namespace, directory: Path) -> Iterator[Check]:
    """vLLM on the device: it starts, agrees with the learner, and takes new weights in place."""
    from raygrpo.engines.vllm.options import vllm_problem

    if problem := vllm_problem(options.device):
        yield Check(name="vllm", value=problem)
        return
    from benchmarks.shapes import save_shape
    from raygrpo.engines.vllm.engine import VllmEngine

    # Kernels of vLLM's on GPUs are of half precision; tolerances are those of the probe.
    dtype, tolerance = ("float32", ENGINE_GAP) if options.device == "cpu" else ("bfloat16", 5e-2)
    path = save_shape("small", directory / "vllm", dtype=dtype)
    start = time.perf_counter()
    engine = VllmEngine(
        ModelSection(path=str(path), dtype=dtype),  # type: ignore[arg-type]
        seed=0,
        max_rows=16,
        device=options.device,
        options={"max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 2**28},
        version=Version(0, 0),
    )
    yield Check(name="vllm: seconds to start", value=f"{time.perf_counter() - start:.1f}")
    try:
        policies = [load(path, dtype=dtype), load(path, random_seed=1, dtype=dtype)]
        for policy in policies:
            policy.to(options.device)
        requests = requests_for(60, 12)
        first = generate(engine, requests)
        gap = engine_gap(first, policies[0], options.device)
        yield Check.most("vllm: logprobs against the learner's", gap, tolerance)
        start = time.perf_counter()
        engine.load_weights(*published(policies[1], 1))
        yield Check(name="vllm: seconds of an update", value=f"{time.perf_counter() - start:.2f}")
        gap = engine_gap(generate(engine, requests), policies[1], options.device)
        yield Check.most("vllm: logprobs after the update", gap, tolerance)
        before = engine_gap(first, policies[1], options.device)
        yield Check.true("vllm: the update changed them", before > 3 * tolerance)
    finally:
        engine.close()
