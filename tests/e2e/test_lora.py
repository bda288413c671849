"""A whole run that trains an adapter: rewards rise, adapters travel, the export is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raygrpo.weights.adapter import merged_weights
from tests import runs

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
STEPS = 40

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    config = runs.write_run(
        directory,
        "run",
        deterministic=False,
        learner={"lora": LORA, "num_ranks": 2, "zero_stage": 3},
        train={"steps": STEPS, "groups_per_step": 8},
        sampling={"num_completions": 8},
        optimizer={"lr": 2e-2, "schedule": "linear"},
    )
    runs.run(config)
    return config


def test_the_reward_rises_and_adapters_travel(trained: Path) -> None:
    steps = runs.metrics(trained)
    rewards = [row["reward"] for row in steps if "reward" in row]
    assert sum(rewards[:3]) / 3 < 0.4 and sum(rewards[-3:]) / 3 > 0.8, rewards
    adapter, export = adapter_of(trained), runs.weights(trained)
    adapter_bytes = sum(t.numel() * t.element_size() for t in adapter.values())
    sent = [row["sync/bytes"] for row in steps if "sync/bytes" in row]
    assert sent and max(sent) <= adapter_bytes
    assert adapter_bytes < 0.5 * sum(t.numel() * t.element_size() for t in export.values())
    gaps = [row.get("sampling/sampling_logp_difference/max", 0.0) for row in steps]
    assert max(gaps) < 1e-3, "fp32: merged weights compute what base and adapter do"


def test_the_export_is_base_and_adapter_merged(trained: Path) -> None:
    base = load_file(trained.parent / "model" / "model.safetensors")
    merged = dict(merged_weights(base.items(), adapter_of(trained), LORA))
    export = runs.weights(trained)
    assert merged.keys() == export.keys()
    # The learner's threads may add in another order than this process.
    assert all(torch.allclose(export[n], t, rtol=1e-6, atol=1e-6) for n, t in merged.items())
    assert any(not torch.equal(export[name], tensor) for name, tensor in base.items())


def adapter_of(config: Path) -> dict[str, torch.Tensor]:
    checkpoint = runs.run_dir(config) / "checkpoints" / f"step-{STEPS}"
    return load_file(checkpoint / "adapter" / "adapter_model.safetensors")
