"""Tokens per second of an engine behind its actor, against the engine called directly.

    python benchmarks/rollout_throughput.py                  # and against model.generate
    python benchmarks/rollout_throughput.py --engine vllm    # in an environment that has vLLM

All sides sample 8 completions of each of 4 prompts of about 105 tokens at temperature 1, 64 new
tokens each (no end comes before), in alternating rounds; the first round warms up. ``direct`` is
the engine's own API: for transformers the engine of this project stepped in a loop, for vllm
`AsyncLLM` with the same requests. ``actor`` is a generator as a run has it, asked over Ray.
``generate`` is transformers' `model.generate` on the prompts repeated, in one batch. Without
``--model`` the model is random, of SmolLM2-135M's shape: the work does not depend on the weights.
Exits with 1 below the bars: behind the actor 0.95 of direct, for either engine, and for
transformers, in bfloat16, 2.5 times `generate` (in float32 that is only reported).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_cases import make_request
from raygrpo.actors.cluster.connect import connect, disconnect
from raygrpo.actors.generator import GeneratorActor
from raygrpo.actors.process import keep_heap, spawn
from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.engines.select import make_engine
from raygrpo.engines.vllm.options import vllm_problem
from raygrpo.models import DTYPES, load_model, quiet_transformers
from raygrpo.types import Group, GroupRequest, Sampling, Version
from tests.tiny import tiny_tokenizer

ACTOR_BAR, GENERATE_BAR = 0.95, 2.5
# On a GPU the sides share it.
GPU_SHARE = {"cpu": 0.0, "cuda": 0.3}
TIMEOUT_S = 600.0
_group_ids = itertools.count()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--engine", choices=["transformers", "vllm"], default="transformers")
    add("--model", help="model directory; none: random, of SmolLM2-135M's shape")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--prompts", type=int, default=4)
    add("--completions", type=int, default=8)
    add("--prompt-length", type=int, default=105)
    add("--new-tokens", type=int, default=64)
    add("--runs", type=int, default=5)
    return parser.parse_args(arguments)


def save_smollm2_shape(directory: Path) -> Path:
    """A directory with SmolLM2-135M's configuration and a tokenizer, for ``random_init``."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def run_config(args: argparse.Namespace, path: str) -> RunConfig:
    """A run whose generator is measured."""
    vllm = args.engine == "vllm"
    memory = {"max_model_len": 1024} | (
        {"gpu_memory_utilization": GPU_SHARE["cuda"]}
        if args.device == "cuda"
        else {"kv_cache_memory_bytes": 2**30}
    )
    return RunConfig.model_validate(
        {
            "model": {"path": path, "dtype": args.dtype, "random_init": not args.model},
            "data": {"source": "none.jsonl"},
            "generators": {
                "engine": args.engine,
                "max_rows": args.prompts * args.completions,
                "options": memory if vllm else {},
            },
            "scorers": {"count": 1},
            "ray": {"address": "local", "gpus": {"generator": GPU_SHARE[args.device]}},
        }
    )


def make_requests(args: argparse.Namespace, prompts: np.ndarray) -> list[GroupRequest]:
    return [
        make_request(next(_group_ids), prompt, args.completions, args.new_tokens, exactly=True)
        for prompt in prompts.tolist()
    ]


def check(groups: Sequence[Group], args: argparse.Namespace) -> None:
    sizes = [c.token_ids.size for group in groups for c in group.completions]
    assert sizes == [args.new_tokens] * args.prompts * args.completions


def direct_transformers(engine: Engine, args: argparse.Namespace) -> Callable[..., None]:
    def run(prompts: np.ndarray) -> None:
        groups: list[Group] = []
        for request in make_requests(args, prompts):
            engine.submit(request)
        while engine.num_unfinished:
            groups += engine.step()
        check(groups, args)

    return run


def direct_vllm(config: RunConfig, args: argparse.Namespace) -> Callable[..., None]:
    """AsyncLLM with the requests that the engine would make, on a loop of its own."""
    assert vllm_problem(args.device) is None, "vLLM is not usable here"
    from vllm.inputs import tokens_input
    from vllm.v1.engine.async_llm import AsyncLLM

    from raygrpo.engines.vllm.requests import engine_arguments, sampling_params

    arguments = engine_arguments(
        config.model,
        seed=0,
        max_rows=config.generators.max_rows,
        device=args.device,
        options=config.generators.options,
    )
    loop, names = asyncio.new_event_loop(), itertools.count()

    async def start() -> AsyncLLM:
        return AsyncLLM.from_engine_args(arguments)

    llm = loop.run_until_complete(start())

    async def complete(prompt: list[int], sampling: Sampling) -> int:
        name = next(names)
        params = sampling_params(sampling, seed=name, stop_ids=[])
        async for output in llm.generate(tokens_input(prompt), params, str(name)):
            last = output
        return len(last.outputs[0].token_ids)

    async def generate(requests: list[GroupRequest]) -> list[int]:
        pairs = [(r.prompt.token_ids.tolist(), r.sampling) for r in requests]
        return await asyncio.gather(
            *(complete(*pair) for pair in pairs for _ in range(args.completions))
        )

    def run(prompts: np.ndarray) -> None:
        sizes = loop.run_until_complete(generate(make_requests(args, prompts)))
        assert sizes == [args.new_tokens] * args.prompts * args.completions

    return run


def behind_actor(config: RunConfig, args: argparse.Namespace) -> Callable[..., None]:
    actor = spawn(
        GeneratorActor, config, None, args.threads, num_cpus=0, num_gpus=GPU_SHARE[args.device]
    )
    ray.get(actor.start.remote(None), timeout=TIMEOUT_S)
    generate = actor.generate.options(num_returns=2)

    def run(prompts: np.ndarray) -> None:
        answers = [generate.remote(request)[1] for request in make_requests(args, prompts)]
        check(ray.get(answers, timeout=TIMEOUT_S), args)

    return run


def plain_generate(model: Any, args: argparse.Namespace) -> Callable[..., None]:
    def run(prompts: np.ndarray) -> None:
        ids = torch.from_numpy(prompts).repeat_interleave(args.completions, 0).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=args.new_tokens,
                max_new_tokens=args.new_tokens,
                pad_token_id=0,
            )
        assert output.shape == (len(ids), prompts.shape[1] + args.new_tokens)

    return run


def make_sides(config: RunConfig, args: argparse.Namespace) -> dict[str, Callable[..., None]]:
    actor = behind_actor(config, args)
    if args.engine == "vllm":
        return {"direct": direct_vllm(config, args), "actor": actor}
    engine = make_engine(config, threads=args.threads, version=Version(0, 0))
    model = load_model(config.model, seed=0, dtype=DTYPES[args.dtype])
    model = model.to(args.device).eval()
    return {
        "generate": plain_generate(model, args),
        "direct": direct_transformers(engine, args),
        "actor": actor,
    }


def measure(
    sides: dict[str, Callable[..., None]], args: argparse.Namespace
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    rng = np.random.default_rng(0)
    for number in range(args.runs + 1):
        # New prompts each round: no side may find one in a cache of an earlier round.
        prompts = rng.integers(3, 80, (args.prompts, args.prompt_length))
        order = list(sides.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            start = time.perf_counter()
            run(prompts)
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def verdict(times: dict[str, list[float]], dtype: str) -> bool:
    """Prints the ratios, and whether the bars hold."""
    holds = True
    bars = [("actor", "direct", ACTOR_BAR)]
    bars += [("direct", "generate", GENERATE_BAR if dtype == "bfloat16" else 0.0)]
    for fast, slow, bar in bars:
        if slow not in times:
            continue
        ratio = statistics.median(times[slow]) / statistics.median(times[fast])
        asked = f"bar {bar} {'holds' if ratio >= bar else 'FAILS'}" if bar else "no bar"
        print(f"{fast} / {slow} in tokens/s: {ratio:.2f} ({asked})")
        holds &= ratio >= bar
    return holds


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 when a bar is missed."""
    args = parse_arguments(arguments)
    keep_heap()  # for all sides; the actor does it itself
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as temporary, quiet_transformers():
        config = run_config(args, args.model or str(save_smollm2_shape(Path(temporary))))
        connection = connect(config)
        try:
            times = measure(make_sides(config, args), args)
        finally:
            disconnect(connection)
    tokens = args.prompts * args.completions * args.new_tokens
    print(f"{vars(args)}\n\n| side | s | tokens/s | runs |\n| --- | --- | --- | --- |")
    for name, values in times.items():
        median = statistics.median(values)
        spread = " ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {median:.2f} | {tokens / median:.0f} | {spread} |")
    return 0 if verdict(times, args.dtype) else 1


if __name__ == "__main__":
    sys.exit(main())
