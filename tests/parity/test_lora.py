"""LoRA on DeepSpeed ranks against one process of plain torch, and against peft itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.errors import ConfigError, InfraError
from raygrpo.learner.lora import add_adapter, lora_config, write_adapter
from raygrpo.learner.reference_learner import ReferenceLearner
from raygrpo.models import load_model
from raygrpo.types import Version, WeightsManifest, merge_stats
from raygrpo.weights.adapter import AdapterBase, adapter_scale, merged_weights
from raygrpo.weights.buckets import make_buckets, unpack
from tests.parity.learner_cases import make_config, make_steps
from tests.parity.test_deepspeed import NUM_STEPS, make_case, relative, run_ranks
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.timeout(600)
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]}
# With a KL, whose reference is the base; sharded down to the smallest parameter under ZeRO-3.
CONFIG: dict[str, Any] = {"loss": {"beta": 0.1}}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


def lora_case(model: Path, stage: int, /, **config: Any) -> dict[str, Any]:
    learner = {"lora": LORA, "deepspeed": SHARDED if stage == 3 else {}}
    return make_case(model, stage, "train_adapter", learner=learner, **{**CONFIG, **config})


@pytest.fixture(scope="module")
def ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All stages in fp32 on two ranks, and stages 1 and 3 in bf16."""
    cases = {f"fp32-{stage}": lora_case(model, stage) for stage in range(4)}
    for stage in (1, 3):
        cases[f"bf16-{stage}"] = lora_case(model, stage, model={"dtype": "bfloat16"})
    return run_ranks(tmp_path_factory.mktemp("lora") / "two", 2, cases)


@pytest.fixture(scope="module")
def reference(model: Path) -> dict[str, Any]:
    learner = ReferenceLearner(make_config(model, learner={"lora": LORA}, **CONFIG))
    before = dict(learner.adapter_weights())
    steps = make_steps(NUM_STEPS, 1, 1)
    history = [learner.update(step[0]) for step in steps]
    after = dict(learner.adapter_weights())
    return {"before": before, "after": after, "history": history, "learner": learner}
