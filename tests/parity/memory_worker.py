"""Learner ranks and engines in processes of their own: the peak of the memory of each, by phase.

Reads cases as lines of JSON and answers each by a line: the peaks of every rank. Libraries are
imported once, and each case is measured in fresh forks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from raygrpo.actors.process import keep_heap
from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.config import RunConfig
from raygrpo.types import (
    Completion,
    Group,
    GroupRequest,
    Microbatch,
    PlannedSample,
    Prompt,
    StepBatch,
    Version,
)

_START = Version(0, 0)


def main() -> None:
    """Answers cases until its input ends: ``{kind: learner or engine, config: ..., warm: ...}``."""
    # Libraries write to the standard output too.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import deepspeed  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from raygrpo.engines.hf.engine import TransformersEngine  # noqa: F401
    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner  # noqa: F401

    torch.set_num_threads(1)
    keep_heap()  # as actors do
    for line in sys.stdin:
        case = json.loads(line)
        configs = [RunConfig.model_validate(case[name]) for name in ("warm", "config")]
        count = configs[1].learner.num_ranks if case["kind"] == "learner" else 1
        port = _free_port()
        ranks = [_fork(case["kind"], configs, rank, port) for rank in range(count)]
        found = [json.loads(os.fdopen(end).read() or "null") for end in ranks]
        print(json.dumps(found), file=answers)
        for _ in ranks:
            os.wait()


def _fork(kind: str, configs: list[RunConfig], rank: int, port: int) -> int:
    """Measures in a new process; the end of the pipe that its peaks come through."""
    reads, writes = os.pipe()
    if os.fork():
        os.close(writes)
        return reads
    try:
        work = {"learner": train, "engine": generate}[kind]
        # What is imported or built at first use belongs to the process, not to the model.
        work(configs[0], rank, port)
        base = high_water(reset=True)
        phases = work(configs[1], rank, port)
        found = {name: peak - base for name, peak in phases.items()} | {"base": base}
        os.write(writes, json.dumps(found).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def high_water(*, reset: bool = False) -> int:
    """The peak of this process's resident memory since the last reset (getrusage cannot reset)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def train(config: RunConfig, rank: int, port: int) -> dict[str, int]:
    """Two steps of full microbatches: the second has the optimizer's state beside it."""
    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner

    learner = DeepSpeedLearner(config, rank=rank, local_rank=rank, master_port=port)
    peaks = {"start": high_water(reset=True)}
    share = full_microbatches(config, learner)
    for _ in range(2):
        learner.update([share])
    peaks["update"] = high_water()
    return {**peaks, "peak": max(peaks.values())}


def full_microbatches(config: RunConfig, learner: Any) -> list[Microbatch]:
    """This rank's share of a step whose prompts and completions have all their tokens."""
    prompt, length = config.data.max_prompt_length, config.sampling.max_tokens
    count, groups = config.sampling.num_completions, range(config.train.groups_per_step)
    samples = tuple(
        PlannedSample(
            group_id=group, completion_index=index, prompt_length=prompt, completion_length=length,
            num_loss_tokens=length, advantage=index - (count - 1) / 2,
            loss_weight=1 / (length * count * len(groups)),
        )
        for group in groups for index in range(count)
    )  # fmt: skip
    index, ranks = learner.data_share
    batch = StepBatch(
        step=0, minibatches=(samples,), payloads=dict.fromkeys(groups),
        versions=dict.fromkeys(groups, (_START, _START)),
    )  # fmt: skip
    (plans,) = place(
        batch, ranks, tokens_per_microbatch=config.train.tokens_per_microbatch,
        layout=learner.layout, hidden_size=learner.hf_model.config.hidden_size,
    )[index]  # fmt: skip
    made = {group: full_group(config, group) for group in groups}
    return [make_microbatch(plan, made) for plan in plans]


def full_group(config: RunConfig, number: int) -> Group:
    length = config.sampling.max_tokens
    rng = np.random.default_rng(number)
    completions = tuple(
        Completion(
            token_ids=rng.integers(3, 80, length).astype(np.int32),
            logprobs=np.full(length, -4.0, np.float32), loss_mask=np.ones(length, np.bool_),
            finish="length", text="", version_runs=((_START, length),),
        )
        for _ in range(config.sampling.num_completions)
    )  # fmt: skip
    return Group(request=full_request(config, number), completions=completions)


def full_request(config: RunConfig, number: int) -> GroupRequest:
    length = config.data.max_prompt_length
    ids = np.random.default_rng(number).integers(3, 80, length).astype(np.int32)
    return GroupRequest(
        stream="train", group_id=number,
        prompt=Prompt(id=str(number), token_ids=ids, text=""), seed=0,
        sampling=config.sampling.settings(), min_version=_START,
    )  # fmt: skip


def generate(config: RunConfig, rank: int, port: int) -> dict[str, int]:
    """As many groups as the engine has rows for, to their full length."""
    from raygrpo.engines.hf.engine import TransformersEngine

    engine = TransformersEngine(
        config.model,
        seed=0,
        max_rows=config.generators.max_rows,
        deterministic=False,
        version=Version(0, 0),
    )
    peaks = {"start": high_water(reset=True)}
    for group in range(config.generators.max_rows // config.sampling.num_completions):
        engine.submit(full_request(config, group))
    while engine.num_unfinished:
        engine.step()
    peaks["decode"] = high_water(reset=True)
    peaks["sync"] = sync(engine)
    return {**peaks, "peak": max(peaks.values())}


def sync(engine: Any) -> int:
    """The peak while a version of the same weights is staged and put into use."""
    from raygrpo.weights.buckets import make_buckets
    from raygrpo.weights.replica import Replica
    from raygrpo.weights.types import WeightsManifest

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
