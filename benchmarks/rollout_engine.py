"""Tokens per second of the embedded engine against ``model.generate``, alternating runs.

    python benchmarks/rollout_engine.py --dtype bfloat16 [--model DIRECTORY]

Without ``--model`` a randomly initialised model of SmolLM2-135M's shape is used; the work does not
depend on the weights, because stops are off for both. Both sides sample 8 completions of each of
4 prompts at temperature 1; ``generate`` is given its prompts repeated, in one batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from raygrpo.config import ModelSection
from raygrpo.engines.transformers_engine import TransformersEngine
from raygrpo.models import DTYPES, load_model, quiet_transformers
from raygrpo.types import GroupRequest, Prompt, Sampling, Version, WeightsManifest
from raygrpo.weights.buckets import make_buckets
from tests.tiny import tiny_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="model directory; none: random, of SmolLM2-135M's shape")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=105)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


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


def time_generate(
    model: torch.nn.Module, prompts: np.ndarray, count: int, new: int
) -> Callable[[], float]:
    ids = torch.from_numpy(prompts).repeat_interleave(count, 0).to(next(model.parameters()).device)

    def run() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        assert output.shape == (len(ids), prompts.shape[1] + new)
        return time.perf_counter() - start

    return run


def time_engine(
    engine: TransformersEngine, prompts: np.ndarray, count: int, new: int
) -> Callable[[], float]:
    sampling = Sampling(num_completions=count, max_tokens=new, min_tokens=new)
    numbers = iter(range(2**62))

    def run() -> float:
        start = time.perf_counter()
        for prompt in prompts:
            ids = prompt.astype(np.int32)
            engine.submit(
                GroupRequest(
                    stream="train",
                    group_id=next(numbers),
                    attempt=0,
                    prompt=Prompt(id="benchmark", text="", token_ids=ids),
                    seed=0,
                    sampling=sampling,
                    min_version=Version(0, 0),
                )
            )
        while engine.num_unfinished:
            for group in engine.step():
                assert all(c.token_ids.size == new for c in group.completions)
        return time.perf_counter() - start

    return run


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.model or str(save_smollm2_shape(Path(temporary)))
        section = ModelSection(path=path, dtype=arguments.dtype, random_init=not arguments.model)
        rows = arguments.prompts * arguments.completions
        engine = TransformersEngine(
            section, seed=0, max_rows=rows, deterministic=False, device=arguments.device
        )
        model = load_model(section, seed=0, dtype=DTYPES[arguments.dtype]).to(arguments.device)
    specs, buckets = zip(*make_buckets(model.named_parameters()), strict=True)
    manifest = WeightsManifest(
        version=Version(0, 0), kind="full", base_version=None, buckets=tuple(specs)
    )
    engine.load_weights(manifest, buckets)
    shape = (arguments.prompts, arguments.prompt_length)
    prompts = np.random.default_rng(0).integers(3, 80, shape)
    sides = {
        "generate": time_generate(model, prompts, arguments.completions, arguments.new_tokens),
        "engine": time_engine(engine, prompts, arguments.completions, arguments.new_tokens),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    with quiet_transformers():
        for number in range(arguments.runs + 1):
            for name, run in sides.items():
                seconds = run()
                if number:  # the first round warms caches up
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{vars(arguments)}")
    for name, seconds in medians.items():
        spread = " ".join(f"{value:.2f}" for value in times[name])
        rate = rows * arguments.new_tokens / seconds
        print(f"{name:9} {seconds:6.2f} s  {rate:7.0f} tokens/s  (runs: {spread})")
    ratios = sorted(
        generate / engine
        for generate, engine in zip(times["generate"], times["engine"], strict=True)
    )
    print(
        f"ratio     {medians['generate'] / medians['engine']:.2f} of medians; "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} over the paired runs"
    )


if __name__ == "__main__":
    main()
