"""The plan of a run: sizes from a configuration, what fits, and what the command says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from raygrpo.cli import app
from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.errors import ConfigError
from raygrpo.memory import generator_memory, learner_memory, model_size, store_memory
from raygrpo.models import load_model
from raygrpo.plan import check_fits, machine_memory, make_plan
from tests.tiny import save_tiny_model

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(root / kind, kind) for kind in ("llama", "qwen2", "gemma3")}


def make(path: Path, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"path": str(path)},
        "data": {"source": "d.jsonl", "max_prompt_length": 16},
        "sampling": {"max_tokens": 16},
        "ray": {"address": "local"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return load_config(base)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_parameters_are_counted_without_weights(kind: str, models: dict[str, Path]) -> None:
    config = make(models[kind])
    model = load_model(config.model, seed=0, dtype=torch.float32)
    size = model_size(config.model)
    assert size.parameters == size.trained == sum(p.numel() for p in model.parameters())
    # Two layers of two key heads, of 8 numbers, for keys and for values.
    assert size.cached == 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_activations_are_what_a_real_forward_pass_saves(kind: str, models: dict[str, Path]) -> None:
    """Of the plain rows that it is counted on: the kernel's own extras are a few percent."""
    config = make(models[kind])
    model = load_model(config.model, seed=0, dtype=torch.float32)
    model.eval()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, use_cache=False)
    measured = sum(storage.nbytes() for storage in saved.values()) / ids.numel()
    assert output is not None
    assert model_size(config.model).activations == pytest.approx(measured, rel=0.1)


def test_an_adapter_has_few_trained_parameters(models: dict[str, Path]) -> None:
    config = make(models["llama"], learner={"lora": LORA})
    size = model_size(config.model, lora=LORA)
    # Two layers; q: 32 -> 32, v: 32 -> 16.
    assert size.trained == 2 * 4 * ((32 + 32) + (32 + 16))
    parts = learner_memory(config, size, row_tokens=32)
    assert parts["optimizer"] == 8 * size.trained
    assert store_memory(config, size)["published versions"] == 3 * 4 * size.trained


def test_stages_divide_what_they_shard(models: dict[str, Path]) -> None:
    size = model_size(make(models["llama"]).model)
    p = 4 * size.parameters

    def parts(stage: int) -> dict[str, int]:
        learner = {"zero_stage": stage, "num_ranks": 4}
        return learner_memory(make(models["llama"], learner=learner), size, row_tokens=32)

    assert [parts(s)["optimizer"] for s in range(4)] == [2 * p] + [2 * (p // 4)] * 3
    assert [parts(s)["master weights"] for s in range(4)] == [0] + [p // 4] * 3
    assert [parts(s)["gradients"] for s in range(4)] == [p, p, p // 4, p // 4]


def test_each_remedy_lowers_its_part(models: dict[str, Path]) -> None:
    def parts(**sections: Any) -> dict[str, int]:
        config = make(models["llama"], **sections)
        return learner_memory(config, model_size(config.model), row_tokens=32)

    plain = parts()
    recomputed = parts(learner={"gradient_checkpointing": True})
    assert recomputed["activations"] < plain["activations"]
    fewer = parts(train={"tokens_per_microbatch": 1024})
    assert fewer["activations"] == plain["activations"] // 4
    halved = parts(
        learner={"num_ranks": 2, "deepspeed": {"sequence_parallel_size": 2}},
    )
    assert halved["activations"] == plain["activations"] // 2
    assert parts(model={"dtype": "bfloat16"})["parameters"] == plain["parameters"] // 2
    assert plain["reference"] == 0 < parts(loss={"beta": 0.1})["reference"]


def test_the_cache_grows_with_rows_and_length(models: dict[str, Path]) -> None:
    config = make(models["llama"], generators={"max_rows": 10, "engine": "transformers"})
    size = model_size(config.model)
    assert generator_memory(config, size)["KV cache"] == 10 * 32 * size.cached


def test_what_does_not_fit_is_refused_with_a_remedy(models: dict[str, Path]) -> None:
    plan = make_plan(make(models["llama"]))
    check_fits(plan, host_bytes=plan.host_bytes, gpu_bytes=None)
    with pytest.raises(ConfigError, match="this machine has") as raised:
        check_fits(plan, host_bytes=plan.host_bytes - 1, gpu_bytes=None)
    assert "learner rank" in raised.value.message and "train." in raised.value.fix
    on_gpu = make_plan(make(models["llama"], ray={"address": "local", "gpus": {"learner": 0.5}}))
    rank = on_gpu.actors[0]
    assert rank.gpu_bytes > 0 and rank.host_bytes == rank.base
    check_fits(on_gpu, host_bytes=2**40, gpu_bytes=2 * rank.gpu_bytes)
    with pytest.raises(ConfigError, match="GPU memory"):
        check_fits(on_gpu, host_bytes=2**40, gpu_bytes=2 * rank.gpu_bytes - 2)
    with pytest.raises(ConfigError, match="has none"):
        check_fits(on_gpu, host_bytes=2**40, gpu_bytes=None)


def test_the_command(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    data = make(models["llama"]).model_dump(mode="json")
    path.write_text(yaml.safe_dump(data))
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    for word in ("learner rank", "generator", "process", "completions a step", "peaks"):
        assert word in shown.output
    ranks = 2 * machine_memory() // 2**28
    bad = CliRunner().invoke(app, ["plan", str(path), f"--learner.num_ranks={ranks}"])
    assert bad.exit_code == 2 and "ConfigError: the run needs about" in bad.output
    missing = CliRunner().invoke(app, ["plan", str(path), f"--model.path={tmp_path}/none"])
    assert missing.exit_code == 2 and "cannot be planned" in missing.output
