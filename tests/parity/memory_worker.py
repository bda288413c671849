"""Learner ranks and engines in processes of their own: the peak bytes of live tensors of each.

Reads configurations by case as JSON, and prints ``{case: [bytes of each rank]}``. Cases whose name
starts with "generator" are an engine's. Each rank is a fork, so that libraries are imported once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.checks.arithmetic import full_step
from raygrpo.config import RunConfig
from raygrpo.types import GroupRequest, Microbatch, Version
from tests import builders

Work = Callable[[RunConfig, int, int], None]


def main() -> None:
    # Libraries write to the standard output too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from raygrpo.engines.hf.engine import TransformersEngine  # noqa: F401
    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner  # noqa: F401

    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    peaks = {}
    for name, sections in json.load(sys.stdin).items():
        config = RunConfig.model_validate(sections)
        work = generate if name.startswith("generator") else train
        port, found = _free_port(), fork.SimpleQueue()
        ranks = [
            fork.Process(target=_measure, args=(work, config, rank, port, found))
            for rank in range(config.learner.num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            assert process.exitcode == 0, f"{name}: a rank failed"
        peaks[name] = [found.get() for _ in ranks]
    json.dump(peaks, answers)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _measure(work: Work, config: RunConfig, rank: int, port: int, found: Any) -> None:
    found.put(peak_bytes(lambda: work(config, rank, port)))


def peak_bytes(work: Callable[[], object]) -> int:
    """The largest sum of live tensors, by what torch's allocator gives and takes back."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    result = profiler.profiler
    assert result is not None and result.kineto_results is not None
    events = [e for e in result.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def train(config: RunConfig, rank: int, port: int) -> None:
    """Two steps of full microbatches: the second has the optimizer's state beside it."""
    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner

    learner = DeepSpeedLearner(config, rank=rank, local_rank=rank, master_port=port)
    share = full_microbatches(config, learner)
    for _ in range(2):
        learner.update([share])


def full_microbatches(config: RunConfig, learner: Any) -> list[Microbatch]:
    """This rank's share of a step whose prompts and completions have all their tokens."""
    index, ranks = learner.data_share
    (plans,) = place(
        full_step(config, config.data.max_prompt_length),
        ranks,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        layout=learner.layout,
        hidden_size=learner.hf_model.config.hidden_size,
    )[index]
    length, count = config.sampling.max_tokens, config.sampling.num_completions
    groups = {
        group: builders.group(
            full_request(config, group), [builders.completion([3] * length)] * count
        )
        for group in range(config.train.groups_per_step)
    }
    return [make_microbatch(plan, groups) for plan in plans]


def full_request(config: RunConfig, number: int) -> GroupRequest:
    return builders.request(
        number,
        num_completions=config.sampling.num_completions,
        tokens=[3] * config.data.max_prompt_length,
        max_tokens=config.sampling.max_tokens,
    )


def generate(config: RunConfig, rank: int, port: int) -> None:
    """As many groups as the engine has rows for, to their full length."""
    from raygrpo.engines.hf.engine import TransformersEngine

    engine = TransformersEngine(
        config.model,
        seed=0,
        max_rows=config.generators.max_rows,
        deterministic=False,
        version=Version(1, 0),
    )
    for group in range(config.generators.max_rows // config.sampling.num_completions):
        engine.submit(full_request(config, group))
    while engine.num_unfinished:
        engine.step()


if __name__ == "__main__":
    main()
