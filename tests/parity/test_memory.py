"""Estimates of memory against the peaks of real processes: a model of 65M random parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.memory import generator_memory, learner_memory, model_size
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
# What an estimate may be off by. Between runs of the same the peak differs by a few percent.
TOLERANCE = 0.2
BF16 = {"dtype": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    "bf16-1": {"model": BF16, "learner": {"zero_stage": 1}},
    "bf16-1-recompute": {
        "model": BF16,
        "learner": {"zero_stage": 1, "gradient_checkpointing": True},
        "train": {"tokens_per_microbatch": 1024},
    },
    "fp32-0": {"learner": {"zero_stage": 0}},
    "fp32-1": {"learner": {"zero_stage": 1}, "train": {"tokens_per_microbatch": 1024}},
    "fp32-3": {"learner": {"zero_stage": 3}},
}
IN_THE_GATE = "bf16-1"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and a tokenizer; weights are drawn by the process that is measured."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=16384,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    ).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def make(path: Path, /, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"path": str(path), "random_init": True},
        "data": {"source": "none.jsonl", "max_prompt_length": 64},
        "sampling": {"max_tokens": 64, "num_completions": 8},
        "train": {"tokens_per_microbatch": 512},
        "generators": {"max_rows": 32, "engine": "transformers"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return load_config(base)


def measure(kind: str, config: RunConfig, directory: Path) -> dict[str, int]:
    """Peaks by phase, in bytes over what the process has before it loads anything."""
    path = directory / "config.json"
    path.write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.memory_worker", kind, str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


@pytest.mark.parametrize(
    "case", [c if c == IN_THE_GATE else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_learner_rank(case: str, model: Path, tmp_path: Path) -> None:
    config = make(model, **CASES[case])
    parts = learner_memory(config, model_size(config.model), row_tokens=128)
    peaks = measure("learner", config, tmp_path)
    assert sum(parts.values()) == pytest.approx(peaks["peak"], rel=TOLERANCE), (parts, peaks)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_generator(dtype: str, model: Path, tmp_path: Path) -> None:
    config = make(model, model={"dtype": dtype})
    parts = generator_memory(config, model_size(config.model))
    peaks = measure("engine", config, tmp_path)
    assert sum(parts.values()) == pytest.approx(peaks["peak"], rel=TOLERANCE), (parts, peaks)
