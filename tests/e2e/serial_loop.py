"""GRPO as one serial loop over the same engine and learner classes, without Ray: what a
deterministic run must equal bit for bit. Run as a script: serial_loop.py CONFIG OUTPUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.algorithm.step_plan import make_step_batch
from raygrpo.algorithm.window import train_request
from raygrpo.config.file import load_config
from raygrpo.data.prompts import PromptSource
from raygrpo.data.sources import load_rows
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.learner.deepspeed_learner import DeepSpeedLearner
from raygrpo.models import load_tokenizer
from raygrpo.types import FinishedGroup, Group, Score, Version, summarise
from raygrpo.weights.buckets import make_buckets
from raygrpo.weights.types import WeightsManifest


def digits(text: str) -> float:
    return sum(c.isdigit() for c in text) / max(len(text), 1)


def main(config_path: str, output: str) -> None:
    config = load_config(Path(config_path))
    torch.set_num_threads(1)
    learner = DeepSpeedLearner(config, rank=0, master_port=int(sys.argv[3]))
    engine = TransformersEngine(config.model, seed=config.seed, max_rows=64, deterministic=True)
    rows = load_rows(config.data, seed=config.seed)
    prompts = PromptSource(
        rows, config.data, load_tokenizer(config.model), seed=config.seed, stream="train"
    )
    group_id = 0
    for step in range(config.train.steps):
        buckets = list(make_buckets(learner.named_weights()))
        manifest = WeightsManifest(
            version=Version(1, step),
            kind="full",
            base_version=None,
            buckets=tuple(spec for spec, _ in buckets),
        )
        engine.load_weights(manifest, [data for _, data in buckets])
        groups: dict[int, Group] = {}
        finished = []
        while len(finished) < config.train.groups_per_step:
            request = train_request(config, group_id, prompts.next(), manifest.version)
            engine.submit(request)
            group_id += 1
            while engine.num_unfinished:
                for group in engine.step():
                    groups[group.request.group_id] = group
            group = groups[request.group_id]
            values = [digits(c.text) for c in group.completions]
            mean = sum(values) / len(values)
            if any(abs(v - mean) > 1e-8 for v in values):
                scores = [Score(value=v, parts={"digits": v}) for v in values]
                summary = summarise(group, scores)
                finished.append(FinishedGroup(summary=summary, payload=None, teaches=True))
        batch = make_step_batch(step, finished, config)
        (plans,) = place(
            batch,
            1,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
            layout=learner.layout,
            hidden_size=learner.hf_model.config.hidden_size,
        )
        learner.update([[make_microbatch(rows, groups) for rows in plan] for plan in plans])
    save_file({name: t.clone() for name, t in learner.named_weights()}, output)
    learner.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
