"""Whole runs with vLLM generating: SmolLM2 learns though a core dies, and adapters travel alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests import runs
from tests.vllm.engines import ECHO, ROOT, SMOLLM2, vllm_processes

DEADLINE_S = 900.0
STEPS = 10
pytestmark = pytest.mark.timeout(DEADLINE_S)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 learns to answer in digits, asynchronously; vLLM's core is killed after a step."""
    directory = tmp_path_factory.mktemp("smollm2")
    rows = [
        {"prompt": f"Question: what is {a} plus {b}?\nAnswer:"} for a in range(6) for b in range(6)
    ]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "reward.py").write_text(runs.REWARD)
    config = {
        "run_dir": str(directory / "run"),
        "model": {"path": str(SMOLLM2)},
        "data": {"source": str(directory / "rows.jsonl"), "max_prompt_length": 32},
        "sampling": {"num_completions": 8, "max_tokens": 12},
        "rewards": [{"func": f"{directory / 'reward.py'}:digits"}],
        "train": {"steps": STEPS, "groups_per_step": 4, "max_staleness": 1},
        "optimizer": {"lr": 3e-5, "schedule": "constant"},
        "scorers": {"count": 1},
        "generators": {
            "max_rows": 32,
            "options": {"max_model_len": 64, "kv_cache_memory_bytes": 2**28},
        },
        "ray": {"address": "local"},
        "tracking": {"wandb": "disabled"},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    process = runs.start(path)
    runs.wait_for(process, lambda: len(runs.metrics(path)) >= 1, "the first step")
    (started,) = runs.events(path, "started")
    for core in vllm_processes(started["pids"]["generator-0"]):
        core.kill()
    output = runs.finish(process, path, deadline_s=DEADLINE_S - 20)
    assert "engine: name vllm, reason vLLM is installed and loads" in output
    return path


def test_the_reward_rises(smollm2: Path) -> None:
    steps = runs.metrics(smollm2)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    rewards = [row["reward"] for row in steps if "reward" in row]
    # From 0.09 to 0.6 in eleven steps when it was tried.
    assert rewards[0] < 0.2, rewards
    assert max(rewards[-3:]) > 0.4, rewards


def test_a_dead_core_costs_its_generator_and_no_group(smollm2: Path) -> None:
    (replaced,) = runs.events(smollm2, "worker_replaced")
    assert replaced["worker"] == "generator-0"
    assert "vLLM" in replaced["error"]
    assert not runs.events(smollm2, "group_dropped")
    assert all(row["ledger/unexplained"] == 0 for row in runs.metrics(smollm2))


def test_each_sync_is_proven_while_completions_are_written(smollm2: Path) -> None:
    steps = runs.metrics(smollm2)
    gaps = [row["sync/probe_gap"] for row in steps if "sync/probe_gap" in row]
    # Float32 on both sides; an update at this rate moves the logprobs of the probe by 1e-2.
    assert gaps and max(gaps) < 1e-3
    assert max(row["staleness/max"] for row in steps) == 1


def test_the_engine_is_recorded_and_kept(smollm2: Path) -> None:
    other = smollm2.with_name("other.yaml")
    config = yaml.safe_load(smollm2.read_text())
    config["generators"] = {"engine": "transformers"}
    config["train"]["steps"] += 1
    other.write_text(yaml.safe_dump(config))
    output = runs.run(other, expected=2)
    assert "began with the engine vllm, but generators.engine is transformers" in output


@pytest.mark.slow
def test_adapters_travel_alone_and_take_effect(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "examples" / "echo" / "config.yaml").read_text())
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    config |= {
        "run_dir": str(tmp_path / "run"),
        "learner": {"num_ranks": 1, "zero_stage": 1, "lora": lora},
        "generators": {"engine": "vllm"},
        "tracking": {"wandb": "disabled"},
    }
    config["model"]["path"] = str(ECHO)
    config["train"] |= {"steps": 4, "dynamic_sampling": False}
    config["eval"] = {"eval_steps": 0}
    path = tmp_path / "lora.yaml"
    path.write_text(yaml.safe_dump(config))
    runs.run(path, deadline_s=DEADLINE_S - 20)
    steps = runs.metrics(path)
    adapter = load_file(
        runs.run_dir(path) / "checkpoints" / "step-00000004" / "adapter/adapter_model.safetensors"
    )
    adapter_bytes = sum(t.numel() * t.element_size() for t in adapter.values())
    sent = [row["sync/bytes"] for row in steps if "sync/bytes" in row]
    assert len(sent) >= 3 and max(sent) <= adapter_bytes
    moved = [row["sync/changed_frac"] for row in steps if row.get("sync/changed_frac")]
    assert moved and max(moved) > 0.1, "versions differ"
    gaps = [row["sampling/sampling_logp_difference/max"] for row in steps]
    # Float32: the merged weights in vLLM compute what base and adapter do in the learner.
    assert max(gaps) < 1e-3
