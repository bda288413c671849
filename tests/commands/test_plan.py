"""The plan of a run: sizes from a configuration, what fits, and what the command says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from raygrpo.checks.memory import (
    FullUpdate,
    Memory,
    generator_memory,
    learner_memory,
    model_size,
    store_memory,
)
from raygrpo.cli import app
from raygrpo.commands.plan import check_fits, machine_memory, make_plan
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError
from raygrpo.models import load_model
from tests.tiny import save_tiny_model

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
CPU = {"device": "cpu"}
GPU = {"gpus": {"generator": 1}}
# Rows that share nothing.
FULL = FullUpdate(microbatches=2, tokens=4096, longest=32)


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


def learner_parts(path: Path, update: FullUpdate = FULL, **sections: Any) -> dict[str, int]:
    """The tensors of a learner rank on the host."""
    config = make(path, **sections)
    size = model_size(config.model, lora=config.learner.lora)
    return learner_memory(config, size, update).host


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
    parts = learner_parts(models["llama"], learner={"lora": LORA})
    assert parts["optimizer"] == 8 * size.trained
    # The head is not trained: its logits alone.
    assert parts["language head"] == 4 * 4096 * size.vocabulary
    assert store_memory(config, size).host["published versions"] == 3 * 4 * size.trained


def test_stages_divide_what_they_shard(models: dict[str, Path]) -> None:
    p = 4 * model_size(make(models["llama"]).model).parameters
    learners = [{"zero_stage": stage, "num_ranks": 4} for stage in range(4)]
    parts = [learner_parts(models["llama"], learner=learner) for learner in learners]
    assert [each["optimizer"] for each in parts] == [2 * p] + [2 * (p // 4)] * 3
    assert [each["master weights"] for each in parts] == [0] + [p // 4] * 3
    assert [each["gradients"] for each in parts] == [p, p, p // 4, p // 4]


def test_gradients_of_one_microbatch_grow_as_its_activations_go(models: dict[str, Path]) -> None:
    size = model_size(make(models["llama"]).model)
    one = learner_parts(models["llama"], replace(FULL, microbatches=1, tokens=1))
    assert one["gradients"] == 4 * size.parameters - size.activations
    assert learner_parts(models["llama"])["gradients"] == 4 * size.parameters


def test_each_remedy_lowers_its_part(models: dict[str, Path]) -> None:
    parts = partial(learner_parts, models["llama"])
    plain = parts()
    recomputed = parts(learner={"gradient_checkpointing": True})
    assert recomputed["activations"] < plain["activations"]
    fewer = parts(replace(FULL, tokens=1024))
    assert fewer["activations"] == plain["activations"] // 4
    halved = parts(learner={"num_ranks": 2, "sequence_parallel": 2})
    assert halved["activations"] == plain["activations"] // 2
    assert parts(model={"dtype": "bfloat16"})["parameters"] == plain["parameters"] // 2
    assert plain["reference"] == 0
    assert parts(loss={"beta": 0.1})["reference"] == plain["parameters"]
    moves = {"loss": {"beta": 0.1}, "learner": {"reference": {"sync_steps": 1, "sync_alpha": 0.5}}}
    assert parts(**moves)["reference"] == plain["parameters"]
    # In bfloat16 its average is in float32 beside it.
    low = parts(model={"dtype": "bfloat16"}, **moves)["reference"]
    assert low == 1.5 * plain["parameters"]


@pytest.mark.parametrize(("where", "heads"), [("host", 2), ("gpu", 4)])
def test_shared_prompts_are_copied_for_each_completion(
    where: str, heads: int, models: dict[str, Path]
) -> None:
    """Two layers of heads of 8 numbers, keys and values, for 100 copied tokens: on a CPU those of
    the model, on a GPU one for each of its queries' heads."""
    ray = {"gpus": {"learner": float(where == "gpu")}}
    more = replace(FULL, copied=100)

    def added(**learner: Any) -> int:
        config = make(models["llama"], ray=ray, learner=learner)
        size = model_size(config.model)
        with_copies, plain = (
            getattr(learner_memory(config, size, update), where)["activations"]
            for update in (more, FULL)
        )
        return int(with_copies - plain)

    assert added() == 100 * 2 * 2 * heads * 8 * 4
    # Recomputed one layer at a time.
    assert added(gradient_checkpointing=True) == 100 * 2 * heads * 8 * 4


def test_a_float32_head_is_counted_in_float32(models: dict[str, Path]) -> None:
    """Its logits, and the sum of its weight's gradient beside the rounded one."""
    vocabulary = model_size(make(models["llama"]).model).vocabulary
    weight, logits = vocabulary * 32, 4096 * vocabulary
    parts = learner_parts(models["llama"], model={"dtype": "bfloat16", "fp32_head": True})
    assert parts["language head"] == 4 * logits + 6 * weight
    plain = learner_parts(models["llama"], model={"dtype": "bfloat16"})
    assert plain["language head"] == 2 * logits + 4 * weight


def on_gpu(path: Path, stage: int, **zero: Any) -> tuple[int, Memory]:
    learner = {"zero_stage": stage, "num_ranks": 2, "deepspeed": {"zero_optimization": zero}}
    config = make(path, ray={"gpus": {"learner": 1}}, learner=learner)
    size = model_size(config.model)
    return 4 * size.parameters, learner_memory(config, size, FULL)


def test_a_rank_on_a_gpu_has_all_but_its_start_there(models: dict[str, Path]) -> None:
    held, memory = on_gpu(models["llama"], 2)
    assert memory.gpu["optimizer"] == held and memory.gpu["parameters"] == held
    # It loads on the host: with nothing else there, this is the model in float32.
    assert sum(memory.host.values()) == memory.host["loading"] == held
    assert "loading" not in {name for name, value in memory.gpu.items() if value}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_to_the_host(stage: int, models: dict[str, Path]) -> None:
    held, memory = on_gpu(models["llama"], stage, offload_optimizer=CPU)
    assert memory.host["optimizer"] == held
    assert memory.host["master weights"] == held // 2
    assert memory.host["gradients"] == (held if stage == 1 else held // 2)
    assert not {"optimizer", "master weights", "gradients", "optimizer step"} & set(memory.gpu)
    assert memory.gpu["parameters"] == (held // 2 if stage == 3 else held)


def test_offload_moves_parameters_to_the_host_at_stage_3_alone(models: dict[str, Path]) -> None:
    held, memory = on_gpu(models["llama"], 3, offload_param=CPU)
    assert memory.host["parameters"] == held // 2 and "parameters" not in memory.gpu
    assert memory.gpu["gathered"] == held and memory.gpu["optimizer"] == held
    _, memory = on_gpu(models["llama"], 2, offload_param=CPU, offload_optimizer={"device": "none"})
    assert memory.gpu["parameters"] == held and "optimizer" not in memory.host


def test_what_fits_by_offload_alone_is_not_refused(models: dict[str, Path]) -> None:
    def plan(**zero: Any) -> Any:
        learner = {"zero_stage": 2, "deepspeed": {"zero_optimization": zero}}
        sections = {"train": {"tokens_per_microbatch": 32}, "ray": {"gpus": {"learner": 1}}}
        return make_plan(make(models["llama"], **sections, learner=learner))

    room = plan(offload_optimizer=CPU).actors[0].gpu_bytes
    check_fits(plan(offload_optimizer=CPU), host_bytes=2**40, gpu_bytes=room)
    with pytest.raises(ConfigError, match="GPU memory") as raised:
        check_fits(plan(), host_bytes=2**40, gpu_bytes=room)
    assert "offload" in (raised.value.fix or "")


def test_the_cache_grows_with_rows_and_length(models: dict[str, Path]) -> None:
    config = make(models["llama"], generators={"max_rows": 10, "engine": "transformers"})
    size = model_size(config.model)
    cache = 10 * 32 * size.cached
    assert generator_memory(config, size).host["KV cache"] == cache
    config = config.model_copy(update={"ray": make(models["llama"], ray=GPU).ray})
    memory = generator_memory(config, size)
    assert memory.gpu["KV cache"] == cache and "KV cache" not in memory.host
    # Two versions in each memory.
    for versions in (memory.host, memory.gpu):
        assert versions["weights"] == versions["next version"] == 4 * size.parameters


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 0.9), ({"gpu_memory_utilization": 0.6}, 0.6), ({"kv_cache_memory_bytes": 2**20}, 0)],
)
def test_vllm_takes_its_share_of_a_gpu(
    options: dict[str, Any], share: float, models: dict[str, Path]
) -> None:
    generators = {"engine": "vllm", "options": options}
    plan = make_plan(make(models["llama"], ray=GPU, generators=generators))
    actor = plan.actors[1]
    assert actor.memory.gpu_share == share
    check_fits(plan, host_bytes=2**40, gpu_bytes=2**40)
    if share:
        has = int(actor.gpu_bytes / share)
        check_fits(plan, host_bytes=2**40, gpu_bytes=has + 2)
        with pytest.raises(ConfigError, match="GPU memory"):
            check_fits(plan, host_bytes=2**40, gpu_bytes=has - 2)
        half = make(models["llama"], ray={"gpus": {"generator": 0.5}}, generators=generators)
        with pytest.raises(ConfigError, match="a generator has 50%") as raised:
            check_fits(make_plan(half), host_bytes=2**40, gpu_bytes=2**40)
        assert "gpu_memory_utilization: 0.5" in (raised.value.fix or "")
    else:
        assert actor.memory.gpu["KV cache"] == 2**20


def test_vllm_on_a_cpu_has_its_cache_on_the_host(models: dict[str, Path]) -> None:
    for options, cache in (({}, 2**31), ({"kv_cache_memory_bytes": 2**20}, 2**20)):
        config = make(models["llama"], generators={"engine": "vllm", "options": options})
        memory = generator_memory(config, model_size(config.model))
        assert memory.host["KV cache"] == cache and not memory.gpu and not memory.gpu_share


def test_what_does_not_fit_is_refused_with_a_remedy(models: dict[str, Path]) -> None:
    plan = make_plan(make(models["llama"]))
    check_fits(plan, host_bytes=plan.host_bytes, gpu_bytes=None)
    with pytest.raises(ConfigError, match="this machine has") as raised:
        check_fits(plan, host_bytes=plan.host_bytes - 1, gpu_bytes=None)
    assert "learner rank" in raised.value.message and "train." in raised.value.fix
    placed = make_plan(make(models["llama"], ray={"gpus": {"learner": 0.5}}))
    rank = placed.actors[0]
    assert rank.gpu_bytes > 0 and rank.host_bytes > 0
    check_fits(placed, host_bytes=2**40, gpu_bytes=2 * rank.gpu_bytes)
    with pytest.raises(ConfigError, match="GPU memory"):
        check_fits(placed, host_bytes=2**40, gpu_bytes=2 * rank.gpu_bytes - 2)
    with pytest.raises(ConfigError, match="has none"):
        check_fits(placed, host_bytes=2**40, gpu_bytes=None)


def test_the_command(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    data = make(models["llama"]).model_dump(mode="json")
    path.write_text(yaml.safe_dump(data))
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    for word in ("learner rank", "generator", "completions a step", "tensors alone are counted"):
        assert word in shown.output
    rows = machine_memory() // 2**10
    bad = CliRunner().invoke(app, ["plan", str(path), f"--generators.max_rows={rows}"])
    assert bad.exit_code == 2 and "ConfigError: the run's tensors alone need about" in bad.output
    missing = CliRunner().invoke(app, ["plan", str(path), f"--model.path={tmp_path}/none"])
    assert missing.exit_code == 2 and "cannot be planned" in missing.output
