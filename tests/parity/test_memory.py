"""Estimates of memory against the tensors of real processes: a model of 2M random parameters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.checks.arithmetic import full_step, fullest_step
from raygrpo.checks.memory import (
    FullUpdate,
    Memory,
    generator_memory,
    learner_memory,
    model_size,
)
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config, merged_sections
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.learner.deepspeed_learner import DeepSpeedLearner
from raygrpo.types import GroupRequest, Microbatch, Version
from tests import builders
from tests.parity.ranks import run_ranks
from tests.tiny import tiny_tokenizer

# An estimate leaves out small tensors, and counts moments of a step as if they were one.
TOLERANCE = 0.2
Sections = dict[str, dict[str, Any]]
BF16 = {"dtype": "bfloat16"}
CPU = {"device": "cpu"}
LORA = {"r": 8, "target_modules": "all-linear"}
TWO_GROUPS = {"groups_per_step": 2}


def zero(stage: int, num_ranks: int = 1, **settings: Any) -> dict[str, Any]:
    return {"zero_stage": stage, "num_ranks": num_ranks, **settings}


def offload(*parts: str) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": dict.fromkeys(parts, CPU)}}


# A prompt of 256 tokens that 16 completions of 32 share, all in one row.
SHARED: Sections = {
    "data": {"max_prompt_length": 256},
    "sampling": {"max_tokens": 32, "num_completions": 16},
    "train": {"tokens_per_microbatch": 768},
}
CASES: dict[str, Sections] = {
    "shared prompts": {"learner": zero(1), **SHARED},
    "adapter": {"learner": zero(1, lora=LORA)},
    "two ranks": {"learner": zero(2, 2), "train": TWO_GROUPS},
    "generator": {},
}
# Cases that the ordinary suite has no time for.
SLOW: dict[str, Sections] = {
    "bf16": {"model": BF16, "learner": zero(1)},
    "reference": {"learner": zero(1), "loss": {"beta": 0.1}},
    "offload 2": {"learner": zero(2, **offload("offload_optimizer"))},
    "generator, bf16": {"model": BF16},
    "stage 0": {"learner": zero(0)},
    "stage 1": {"learner": zero(1)},
    "stage 3": {"learner": zero(3)},
    "two microbatches": {"learner": zero(1), "train": TWO_GROUPS},
    "reference, two microbatches": {
        "learner": zero(1), "loss": {"beta": 0.1}, "train": TWO_GROUPS
    },
    "adapter, two microbatches": {"learner": zero(1, lora=LORA), "train": TWO_GROUPS},
    "adapter, recomputed": {"learner": zero(1, lora=LORA, gradient_checkpointing=True)},
    "recomputed": {"learner": zero(1, gradient_checkpointing=True)},
    "recomputed, two microbatches": {
        "learner": zero(1, gradient_checkpointing=True), "train": TWO_GROUPS
    },
    "shared prompts, recomputed": {"learner": zero(1, gradient_checkpointing=True), **SHARED},
    "bf16, float32 head": {"model": BF16 | {"fp32_head": True}, "learner": zero(1)},
    "two ranks, stage 1": {"learner": zero(1, 2), "train": {"groups_per_step": 4}},
    "two ranks, stage 3": {"learner": zero(3, 2), "train": TWO_GROUPS},
    "offload 2, two microbatches": {
        "learner": zero(2, **offload("offload_optimizer")), "train": TWO_GROUPS
    },
    "offload 3": {"learner": zero(3, **offload("offload_optimizer", "offload_param"))},
}  # fmt: skip

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and a tokenizer; weights are drawn by the process that is measured."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=4096,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=6,
        num_attention_heads=10,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    ).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def make(path: Path, case: str) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"path": str(path), "random_init": True},
        "data": {"source": "none.jsonl", "max_prompt_length": 64},
        "sampling": {"max_tokens": 64, "num_completions": 8},
        "train": {"tokens_per_microbatch": 640, "groups_per_step": 1},
        "generators": {"max_rows": 32, "engine": "transformers"},
        # A bucket smaller than the model: DeepSpeed allocates all of it, whatever it uses.
        "learner": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 500_000}}},
    }
    return load_config(merged_sections(base, {**CASES, **SLOW}[case]))


@pytest.fixture(scope="module")
def peaks(model: Path, request: pytest.FixtureRequest) -> dict[str, int]:
    """The peak bytes of tensors by case; of several ranks, those of the rank with the most."""
    found = {}
    for case in {**CASES, **SLOW} if request.config.getoption("--slow") else CASES:
        config = make(model, case)
        work = generator_peak if case.startswith("generator") else learner_peak
        found[case] = max(run_ranks(work, config.learner.num_ranks, model / case, config))
    return found


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


def full_update(config: RunConfig) -> FullUpdate:
    size = model_size(config.model)
    longest = config.data.max_prompt_length
    return fullest_step(config, longest, hidden_size=size.hidden_size, layout=size.layout)


def estimate(case: str, config: RunConfig) -> Memory:
    size = model_size(config.model, lora=config.learner.lora)
    if not case.startswith("generator"):
        return learner_memory(config, size, full_update(config))
    memory = generator_memory(config, size)
    # The measured engine decodes, and takes up no version.
    return Memory(host={**memory.host, "next version": 0})


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_the_estimate_is_that_of_real_tensors(
    case: str, model: Path, peaks: dict[str, int]
) -> None:
    planned = estimate(case, make(model, case))
    total = sum(planned.host.values())
    print(f"{case}: planned {total / 2**20:.1f} MiB, measured {peaks[case] / 2**20:.1f}")
    assert total == pytest.approx(peaks[case], rel=TOLERANCE), planned.host


def test_the_shared_prompts_really_are(model: Path) -> None:
    """All 16 completions of 32 tokens lie in one row of their prompt's 256, which each copies."""
    update = full_update(make(model, "shared prompts"))
    assert update == FullUpdate(microbatches=1, tokens=768, longest=768, copied=16 * 256)
