"""The peak bytes of live tensors in a learner's rank, and in an engine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.checks.arithmetic import full_step
from raygrpo.config import RunConfig
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.learner.deepspeed_learner import DeepSpeedLearner
from raygrpo.types import GroupRequest, Microbatch, Version
from tests import builders


def peak_bytes(work: Callable[[], object]) -> int:
    """The largest sum of live tensors, by what torch's allocator gives and takes back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    result = profiler.profiler
    assert result is not None and result.kineto_results is not None
    events = [e for e in result.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def learner_peak(config: RunConfig, rank: int, port: int) -> int:
    """In two steps of full microbatches: the second has the optimizer's state beside it."""
    return peak_bytes(lambda: train(config, rank, port))


def train(config: RunConfig, rank: int, port: int) -> None:
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


def generator_peak(config: RunConfig, rank: int, port: int) -> int:
    """With as many groups as the engine has rows for, to their full length."""
    return peak_bytes(lambda: generate(config))


def generate(config: RunConfig) -> None:
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
