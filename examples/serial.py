"""GRPO in one file: what a run does, in one process, from top to bottom.

    python examples/serial.py examples/echo/config.yaml [--section.key=value ...]

A run spreads this loop over Ray actors, which hold the same engine, rewards and learner. A
deterministic ``raygrpo train`` on one rank ends with the same weights, bit for bit
(tests/e2e/test_exactness.py runs both).
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

import torch

from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.algorithm.step_plan import make_step_batch, teaches
from raygrpo.algorithm.window import train_request
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.data.prompts import PromptSource
from raygrpo.data.sources import load_rows
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.learner.deepspeed_learner import DeepSpeedLearner
from raygrpo.models import load_tokenizer
from raygrpo.rewards.contract import TrainerState
from raygrpo.rewards.host import RewardHost
from raygrpo.types import FinishedGroup, Group, GroupRequest, StepBatch, Version, summarise
from raygrpo.weights.buckets import make_buckets
from raygrpo.weights.export import write_model
from raygrpo.weights.types import WeightsManifest


def train(config: RunConfig, directory: Path) -> None:
    """Trains, prints each step's mean reward, and writes the model into ``directory``."""
    torch.set_num_threads(1)  # more threads add in another order: other bits
    rows, tokenizer = load_rows(config.data, seed=config.seed), load_tokenizer(config.model)
    prompts = PromptSource(rows, config.data, tokenizer, seed=config.seed, stream="train")
    engine = TransformersEngine(config.model, seed=config.seed, max_rows=64, deterministic=True)
    learner = DeepSpeedLearner(config, master_port=0)
    group_id = 0  # the order of the groups; with the seed, the key of all randomness
    with RewardHost(config.rewards, {}) as rewards:
        for step in range(config.train.steps):
            # 1. On-policy: completions come from the weights that this step trains.
            version = Version(1, step)
            load_weights(engine, learner, version)

            # 2. Roll out groups: G completions of one prompt, and a score for each. A group of
            #    equal scores teaches nothing: another prompt takes its place, a few times a step.
            progress = TrainerState(global_step=step, max_steps=config.train.steps)
            trained: list[FinishedGroup] = []
            values: list[float | None] = []
            refills = config.train.max_refills
            while len(trained) < config.train.groups_per_step:
                group = generate(engine, train_request(config, group_id, prompts.next(), version))
                group_id += 1
                scores = rewards.score(group, progress).scores
                values += [score.value for score in scores]
                summary = summarise(group, scores)
                useful = teaches(summary, config)
                if useful or refills == 0:
                    trained.append(FinishedGroup(summary=summary, payload=group, teaches=useful))
                else:
                    refills -= 1

            # 3. Advantages: each score minus the mean of its group, in the default recipe.
            batch = make_step_batch(step, trained, config)

            # 4. The update: logprobs, ratios, the clipped loss, its gradient, AdamW.
            update(learner, batch, config)
            reward = fmean(value for value in values if value is not None)
            print(f"step {step + 1}/{config.train.steps}  reward {reward:.4f}", flush=True)
    write_model(directory, learner.named_weights(), learner.hf_model, config.model)
    learner.close()


def load_weights(engine: TransformersEngine, learner: DeepSpeedLearner, version: Version) -> None:
    """Copies the learner's weights into the engine."""
    buckets = list(make_buckets(learner.named_weights()))
    specs = tuple(spec for spec, _ in buckets)
    manifest = WeightsManifest(version=version, kind="full", base_version=None, buckets=specs)
    engine.load_weights(manifest, [data for _, data in buckets])


def generate(engine: TransformersEngine, request: GroupRequest) -> Group:
    """Samples the completions of one prompt, one token of each at a time."""
    engine.submit(request)
    while not (finished := engine.step()):
        pass
    return finished[0]


def update(learner: DeepSpeedLearner, batch: StepBatch, config: RunConfig) -> None:
    """Packs a step's samples into microbatches and trains on them."""
    may_skip = config.train.dynamic_sampling and not config.loss.acts_without_signal
    if may_skip and not batch.has_signal:
        learner.update((), skip=True)  # all advantages are 0
        return
    (minibatches,) = place(
        batch,
        num_ranks=1,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        layout=learner.layout,
        hidden_size=learner.hf_model.config.hidden_size,
    )
    learner.update([[make_microbatch(rows, batch.payloads) for rows in m] for m in minibatches])


if __name__ == "__main__":
    overrides = ["--deterministic=true", "--learner.num_ranks=1", *sys.argv[2:]]
    config = load_config(sys.argv[1], overrides)
    train(config, Path(config.run_dir, "serial"))
