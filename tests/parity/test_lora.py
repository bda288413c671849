"""LoRA on DeepSpeed ranks against one process of plain torch, and against peft itself."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raygrpo.errors import ConfigError, InfraError
from raygrpo.learner.lora import add_adapter, lora_config, write_adapter
from raygrpo.models import load_model
from raygrpo.types import Version, merge_stats
from raygrpo.weights.adapter import AdapterBase, merged_weights
from raygrpo.weights.buckets import make_version, unpack
from raygrpo.weights.types import WeightsManifest
from tests.close import relative_weights
from tests.parity.learner_cases import make_config, make_steps
from tests.parity.reference_learner import ReferenceLearner
from tests.parity.test_deepspeed import NUM_STEPS, chosen, edges_first, make_case, run_cases
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.timeout(600)
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]}
# With a KL, whose reference is the base; sharded down to the smallest parameter under ZeRO-3.
CONFIG: dict[str, Any] = {"loss": {"beta": 0.1}}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def lora_case(model: Path, stage: int, /, **config: Any) -> dict[str, Any]:
    learner = {"lora": LORA, "deepspeed": SHARDED if stage == 3 else {}}
    return make_case(model, stage, "train_adapter", learner=learner, **{**CONFIG, **config})


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Two ranks, in fp32 and in bf16."""
    cases = {f"fp32-{stage}": lora_case(model, stage) for stage in chosen(request)}
    cases["bf16-3"] = lora_case(model, 3, model={"dtype": "bfloat16"})
    return run_cases(tmp_path_factory.mktemp("lora") / "two", 2, cases)


@pytest.fixture(scope="module")
def reference(model: Path) -> dict[str, Any]:
    learner = ReferenceLearner(make_config(model, learner={"lora": LORA}, **CONFIG))
    before = dict(learner.adapter_weights())
    steps = make_steps(NUM_STEPS, 1, 1)
    history = [learner.update(step[0]) for step in steps]
    after = dict(learner.adapter_weights())
    return {"before": before, "after": after, "history": history, "learner": learner}


@pytest.mark.parametrize("stage", edges_first())
def test_two_ranks_equal_one_process(
    stage: int, ranks: list[dict[str, Any]], reference: dict[str, Any]
) -> None:
    """Measured: 3e-8 of the norm (1e-7 under ZeRO-3), where training moved it by 4e-2."""
    moved = relative_weights(reference["after"], reference["before"])
    assert moved > 0.01
    reports = [rank[f"fp32-{stage}"] for rank in ranks]
    for report in reports:
        assert all(torch.equal(report["before"][n], t) for n, t in reference["before"].items())
        assert relative_weights(report["after"], reference["after"]) < 1e-5
    for step, expected in enumerate(reference["history"]):
        ours = merge_stats([report["history"][step] for report in reports])
        for name in ("loss", "grad_norm", "ratio"):
            assert ours[name].sum == pytest.approx(expected[name].sum, rel=1e-5, abs=1e-6)
        # A token's exp(d) - d - 1 near 0 is rounded as numbers near 1 are.
        kl, unit = expected["kl"], torch.finfo(torch.float32).eps
        assert ours["kl"].sum == pytest.approx(kl.sum, rel=1e-5, abs=unit * kl.count)


def test_only_the_adapter_moves(ranks: list[dict[str, Any]], model: Path) -> None:
    from safetensors.torch import load_file

    base = load_file(model / "model.safetensors")
    for case in ("fp32-0", "fp32-3"):
        merged = ranks[0][case]["merged"]
        assert merged.keys() == base.keys()
        for name, tensor in merged.items():
            targeted = any(target in name for target in LORA["target_modules"])
            targeted = targeted and name.endswith(".weight")
            assert torch.equal(tensor, base[name]) != targeted, name


@pytest.mark.parametrize("case", ["fp32-0", "fp32-3", "bf16-3"])
def test_merged_weights_compute_what_base_and_adapter_do(
    case: str, ranks: list[dict[str, Any]], model: Path
) -> None:
    """fp32: measured 3e-6. bf16 against fp32: 0.08 without an adapter, 0.10 with a merged one."""
    report, dtype = ranks[0][case], "bfloat16" if case.startswith("bf16") else "float32"
    config = make_config(model, **CONFIG)
    scored = make_steps(NUM_STEPS, 1, 2)[0][0][0][0]
    for adapter, expected in zip((None, report["merged"]), report["scores"], strict=True):
        learner = ReferenceLearner(config)
        if adapter is not None:
            weights = {name: tensor.float() for name, tensor in adapter.items()}
            learner.hf_model.load_state_dict(weights, strict=False)
        gap = np.abs(learner.score(scored) - expected).max()
        assert gap < (1e-5 if dtype == "float32" else 0.2)
    assert np.abs(report["scores"][1] - report["scores"][0]).max() > 0.05


def test_generators_merge_what_checkpoints_hold(ranks: list[dict[str, Any]], model: Path) -> None:
    """Bit for bit, from the published bytes, which are the adapter's and nothing else's."""
    for case in ("fp32-3", "bf16-3"):
        report = ranks[0][case]
        dtype = "bfloat16" if case.startswith("bf16") else "float32"
        config = make_config(model, model={"dtype": dtype}, learner={"lora": LORA})
        manifest, arrays = published(report["after"])
        size = sum(t.numel() * t.element_size() for t in report["after"].values())
        assert manifest.num_bytes == size < 0.5 * model_bytes(report["merged"])
        base = AdapterBase(config)
        for _ in range(2):
            full, buckets = base.full_version(manifest, arrays)
            held = dict(pair for s, d in zip(full.buckets, buckets, strict=True)
                        for pair in unpack(s, d))  # fmt: skip
            assert (full.kind, full.version) == ("full", manifest.version)
            assert held.keys() == report["merged"].keys()
            assert all(torch.equal(held[name], t) for name, t in report["merged"].items())


def published(adapter: dict[str, Tensor]) -> tuple[WeightsManifest, list[Any]]:
    manifest, buckets = make_version(Version(1, 2), adapter.items(), 4096)
    return replace(manifest, kind="adapter"), buckets


def model_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_an_adapter_of_other_layers_is_refused(ranks: list[dict[str, Any]], model: Path) -> None:
    adapter = ranks[0]["fp32-0"]["after"]
    config = make_config(model, learner={"lora": LORA})
    renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in adapter.items()}
    with pytest.raises(InfraError, match="other layers"):
        AdapterBase(config).full_version(*published(renamed))
    base = AdapterBase(config)
    base.full_version(*published(adapter))
    part = {name: tensor for name, tensor in adapter.items() if "layers.0." in name}
    with pytest.raises(InfraError, match="other layers"):
        base.full_version(*published(part))


@pytest.mark.parametrize(
    "lora",
    [LORA, {"r": 3, "use_rslora": True}, {"r": 2, "target_modules": "all-linear",
     "rank_pattern": {"o_proj": 5}}],
    ids=["plain", "rslora", "rank_pattern"],
)  # fmt: skip
def test_peft_reads_our_adapters_and_merges_them_alike(
    lora: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """peft adds in another order, so to fp32's rounding."""
    from peft import PeftModel

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

    config = make_config(model, learner={"lora": lora})
    learner = ReferenceLearner(config)
    learner.update(make_steps(1, 1, 1)[0][0])
    adapter = dict(learner.adapter_weights())
    write_adapter(tmp_path, adapter, config)
    plain = load_model(config.model, seed=0, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    expected = dict(theirs.named_parameters())
    merged = dict(learner.named_weights())
    assert merged.keys() == expected.keys()
    assert relative_weights(merged, {name: expected[name] for name in merged}) < 1e-7
    base = load_model(config.model, seed=0, dtype=torch.float32)
    again = dict(merged_weights(base.named_parameters(), adapter, lora))
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())


def test_an_adapter_resumes_bit_for_bit(reference: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(reference["learner"].config.model.path, learner={"lora": LORA}, **CONFIG)
    reference["learner"].save(tmp_path)
    fresh = ReferenceLearner(config)
    fresh.load(tmp_path)
    loaded = dict(fresh.adapter_weights())
    assert all(torch.equal(loaded[n], t) for n, t in reference["after"].items())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rr": 8}, r"unknown key learner\.lora\.rr\n.*did you mean 'r'"),
        ({"lora_aplha": 8}, "did you mean 'lora_alpha'"),
        ({"lora_dropout": 0.1}, "noise"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
    ],
)
def test_bad_arguments_are_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_config(make_config("model", learner={"lora": lora}))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qproj"], "q_proj"),
        (["lm_head"], "language head"),
        (["embed_tokens"], "Embedding"),
    ],
)
def test_layers_that_cannot_carry_an_adapter_are_refused(
    targets: list[str], message: str, tmp_path: Path
) -> None:
    config = make_config(
        save_tiny_model(tmp_path, "llama"), learner={"lora": {"r": 2, "target_modules": targets}}
    )
    model = load_model(config.model, seed=0, dtype=torch.float32)
    with pytest.raises(ConfigError, match=message):
        add_adapter(model, config)
