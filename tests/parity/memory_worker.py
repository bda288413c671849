"""One learner rank or one engine in a process of its own: the peak of its memory, by phase."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from raygrpo.config import RunConfig
from raygrpo.types import GroupRequest, Microbatch, Prompt, Version


def main() -> None:
    """Arguments: learner or engine, and the configuration as JSON. Prints bytes as JSON."""
    import deepspeed  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from raygrpo.engines.transformers_engine import TransformersEngine  # noqa: F401
    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner  # noqa: F401
    from raygrpo.models import load_tokenizer

    torch.set_num_threads(2)
    config = RunConfig.model_validate_json(Path(sys.argv[2]).read_text())
    load_tokenizer(config.model)
    torch.ones(64, 64) @ torch.ones(64, 64)
    base = high_water(reset=True)
    phases = {"learner": train, "engine": generate}[sys.argv[1]](config)
    print(json.dumps({name: peak - base for name, peak in phases.items()} | {"base": base}))


def high_water(*, reset: bool = False) -> int:
    """The peak of this process's resident memory since the last reset (getrusage cannot reset)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def train(config: RunConfig) -> dict[str, int]:
    """Two updates of a full microbatch: the second has the optimizer's state beside it."""
    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learner = DeepSpeedLearner(config, master_port=port)
    peaks = {"start": high_water(reset=True)}
    for _ in range(2):
        learner.update([[full_microbatch(config)]])
    peaks["update"] = high_water()
    learner.close()
    return {**peaks, "peak": max(peaks.values())}


def full_microbatch(config: RunConfig) -> Microbatch:
    """Plain rows of the longest prompt and completion, as many as fit."""
    prompt, length = config.data.max_prompt_length, config.sampling.max_tokens
    num_rows = config.train.tokens_per_microbatch // (prompt + length)
    shape = (num_rows, prompt + length)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    rows = np.broadcast_to(np.arange(num_rows, dtype=np.int32)[:, None], shape)
    mask = positions >= prompt
    return Microbatch(
        token_ids=np.random.default_rng(0).integers(3, 80, shape).astype(np.int32),
        positions=positions,
        segment_ids=np.zeros(shape, np.int32),
        parent_ids=np.full(shape, -1, np.int32),
        predictors=np.maximum(positions - 1, 0),
        loss_mask=mask,
        sampler_logprobs=np.where(mask, -4.0, 0.0).astype(np.float32),
        sequence_ids=np.where(mask, rows, -1).astype(np.int32),
        advantages=np.linspace(-1, 1, num_rows, dtype=np.float32),
        loss_weights=np.full(num_rows, 1 / mask.sum(), np.float32),
    )


def generate(config: RunConfig) -> dict[str, int]:
    """As many groups as the engine has rows for, to their full length."""
    from raygrpo.engines.transformers_engine import TransformersEngine

    engine = TransformersEngine(
        config.model,
        seed=0,
        max_rows=config.generators.max_rows,
        deterministic=False,
        version=Version(0, 0),
    )
    peaks = {"start": high_water(reset=True)}
    size, length = config.sampling.num_completions, config.data.max_prompt_length
    for group in range(config.generators.max_rows // size):
        ids = np.random.default_rng(group).integers(3, 80, length).astype(np.int32)
        engine.submit(
            GroupRequest(
                stream="train",
                group_id=group,
                attempt=0,
                prompt=Prompt(id=str(group), token_ids=ids, text=""),
                seed=0,
                sampling=config.sampling.settings(),
                min_version=Version(0, 0),
            )
        )
    while engine.num_unfinished:
        engine.step()
    peaks["decode"] = high_water(reset=True)
    peaks["sync"] = sync(engine)
    return {**peaks, "peak": max(peaks.values())}


def sync(engine: Any) -> int:
    """The peak while a version of the same weights is staged and put into use."""
    from raygrpo.types import WeightsManifest
    from raygrpo.weights.buckets import make_buckets
    from raygrpo.weights.replica import Replica

    replica = Replica()
    for step in (1, 2):
        pairs = list(make_buckets((n, t.data) for n, t in engine._weights.targets.items()))
        manifest = WeightsManifest(
            version=Version(1, step), kind="full", base_version=None,
            buckets=tuple(spec for spec, _ in pairs),
        )  # fmt: skip
        staged = replica.stage([(manifest, [data for _, data in pairs])])
        del pairs
        engine.stage_weights(staged.manifest, list(staged.buckets))
        engine.commit_weights()
        replica.commit(staged)
    return high_water()


if __name__ == "__main__":
    main()
