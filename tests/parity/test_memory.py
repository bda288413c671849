"""Estimates of memory against the peaks of real processes: a model of 12M random parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raygrpo.checks.arithmetic import fullest_step
from raygrpo.checks.memory import FullUpdate, generator_memory, learner_memory, model_size
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from tests.tiny import save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
# What an estimate may be off by. Between runs of the same the peak differs by a few percent.
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
# Products in bfloat16 are slow on CPUs without instructions for them.
FEW: Sections = {"sampling": {"num_completions": 4}, "train": {"tokens_per_microbatch": 192}}
CASES: dict[str, Sections] = {
    "bf16": {"model": BF16, "learner": zero(1), **FEW},
    "shared prompts": {"learner": zero(1), **SHARED},
    "reference": {"learner": zero(1), "loss": {"beta": 0.1}},
    "adapter": {"learner": zero(1, lora=LORA)},
    "two ranks": {"learner": zero(2, 2), "train": TWO_GROUPS},
    "offload 2": {"learner": zero(2, **offload("offload_optimizer"))},
}
# As above, and what the ordinary suite has no time for.
SLOW: dict[str, Sections] = {
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
    "bf16, one microbatch": {"model": BF16, "learner": zero(1)},
    "bf16, float32 head": {"model": BF16 | {"fp32_head": True}, "learner": zero(1)},
    "two ranks, stage 1": {"learner": zero(1, 2), "train": {"groups_per_step": 4}},
    "two ranks, stage 3": {"learner": zero(3, 2), "train": TWO_GROUPS},
    "offload 2, two microbatches": {
        "learner": zero(2, **offload("offload_optimizer")), "train": TWO_GROUPS
    },
    "offload 3": {"learner": zero(3, **offload("offload_optimizer", "offload_param"))},
}  # fmt: skip
# What imports and first uses take is no part of a model: the same, on a model of nothing.
WARM: Sections = {
    "data": {"max_prompt_length": 8},
    "sampling": {"max_tokens": 8, "num_completions": 4},
    "train": {"tokens_per_microbatch": 64},
    "generators": {"max_rows": 4},
}

pytestmark = pytest.mark.timeout(600)
Measure = Callable[[str, Sections], int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and a tokenizer; weights are drawn by the process that is measured."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=8192,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    ).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def make(path: Path, *changes: Sections) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"path": str(path), "random_init": True},
        "data": {"source": "none.jsonl", "max_prompt_length": 64},
        "sampling": {"max_tokens": 64, "num_completions": 8},
        "train": {"tokens_per_microbatch": 640, "groups_per_step": 1},
        "generators": {"max_rows": 32, "engine": "transformers"},
    }
    for sections in changes:
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values}
    return load_config(base)


@pytest.fixture(scope="module")
def measure(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measure]:
    """The peak of one process, in bytes over what it has before it loads anything."""
    tiny = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.parity.memory_worker"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None

        def ask(kind: str, sections: Sections) -> int:
            configs = {"config": make(model, sections), "warm": make(tiny, sections, WARM)}
            case = {name: config.model_dump(mode="json") for name, config in configs.items()}
            print(json.dumps({"kind": kind, **case}), file=worker.stdin, flush=True)
            ranks = json.loads(worker.stdout.readline())
            assert all(ranks), "a process failed; its traceback is above"
            return max(int(rank["peak"]) for rank in ranks)

        yield ask
        worker.stdin.close()


def full_update(config: RunConfig) -> FullUpdate:
    size = model_size(config.model)
    longest = config.data.max_prompt_length
    return fullest_step(config, longest, hidden_size=size.hidden_size, layout=size.layout)


def check(case: str, planned: int, measured: int) -> None:
    mib = planned / 2**20, measured / 2**20
    print(f"{case}: planned {mib[0]:.0f} MiB, measured {mib[1]:.0f}, ratio {mib[0] / mib[1]:.2f}")
    assert planned == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_learner_rank(case: str, model: Path, measure: Measure) -> None:
    """Of two ranks, the one that takes more."""
    sections = {**CASES, **SLOW}[case]
    config = make(model, sections)
    size = model_size(config.model, lora=config.learner.lora)
    planned = learner_memory(config, size, full_update(config))
    assert not planned.gpu
    check(case, sum(planned.host.values()), measure("learner", sections))


def test_the_shared_prompts_really_are(model: Path) -> None:
    """All 16 completions of 32 tokens lie in one row of their prompt's 256, which each copies."""
    update = full_update(make(model, CASES["shared prompts"]))
    assert update == FullUpdate(microbatches=1, tokens=768, longest=768, copied=16 * 256)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_generator(dtype: str, model: Path, measure: Measure) -> None:
    sections = {"model": {"dtype": dtype}}
    config = make(model, sections)
    planned = generator_memory(config, model_size(config.model))
    check(f"generator {dtype}", sum(planned.host.values()), measure("engine", sections))
