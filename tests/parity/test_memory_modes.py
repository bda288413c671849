"""Training what does not fit, against one process of plain torch: shared rows, and offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raygrpo.errors import ConfigError
from raygrpo.learner.attention.ulysses import (
    SequenceShard,
    UlyssesAttention,
    check_attention,
)
from raygrpo.models import refuse_unknown
from tests.close import relative_weights
from tests.parity.learner_cases import make_config
from tests.parity.test_deepspeed import check, make_case, reference_run, run_cases
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.timeout(600)
SHARED: dict[str, Any] = {"sequence_parallel": 2}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# Several updates, a KL, and a ratio of whole sequences, which are cut in the middle. Llama has a
# head of its own, Qwen2 a tied one, and Gemma 3 a sliding window shorter than its rows.
MANY: dict[str, Any] = {
    "loss": {"loss": "gspo", "beta": 0.1},
    "train": {"num_minibatches": 2, "num_iterations": 2},
}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "llama-0": ("llama", 0, {}, MANY),
    "qwen2-2": ("qwen2", 2, {}, MANY),
    "gemma3-3": ("gemma3", 3, SHARDED, {}),
    "recompute-3": ("qwen2", 3, SHARDED, MANY),
}
# In the ordinary suite: a head of its own, a tied one, and windows.
QUICK = ("llama-0", "qwen2-2", "gemma3-3")
TO_CPU = {"device": "cpu"}
OFFLOAD: dict[int, dict[str, Any]] = {
    2: {"offload_optimizer": TO_CPU},
    3: {"offload_optimizer": TO_CPU, "offload_param": TO_CPU, **SHARDED["zero_optimization"]},
}


@pytest.fixture(scope="module")
def two_ranks(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    cases = {}
    slow = request.config.getoption("--slow")
    for name, (kind, stage, settings, config) in CASES.items():
        if name not in QUICK and not slow:
            continue
        learner = {**SHARED, "deepspeed": settings}
        learner["gradient_checkpointing"] = name.startswith("recompute")
        cases[name] = make_case(models[kind], stage, "train", **config, learner=learner)
    root = tmp_path_factory.mktemp("ranks")
    for stage, zero in OFFLOAD.items():
        learner = {"deepspeed": {"zero_optimization": zero}}
        for scenario in ("train", "save_and_die", "resume") if stage == 3 or slow else ("train",):
            config = MANY if scenario == "train" else {}
            case = make_case(models["qwen2"], stage, scenario, **config, learner={**learner})
            saved = {"directory": str(root / f"saved-{stage}"), "die": False, "dirty": True}
            cases[f"{scenario}-{stage}"] = {**case, **saved}
        (root / f"saved-{stage}").mkdir()
    # Gradients leave in many buckets, as those of a model beyond DeepSpeed's bucket size do.
    small = {**SHARDED["zero_optimization"], "reduce_bucket_size": 4000}
    learner = {"deepspeed": {"zero_optimization": small}}
    cases["small buckets"] = make_case(models["qwen2"], 3, "train", **MANY, learner=learner)
    results = run_cases(root / "two", 2, cases)
    for rank, result in enumerate(results):
        for stage in OFFLOAD if slow else (3,):
            path = root / f"saved-{stage}" / f"uninterrupted-{rank}.pt"
            result[f"uninterrupted-{stage}"] = torch.load(path, weights_only=False)
    return results


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_shared_rows_equal_whole_rows(case: str, two_ranks: Any, models: dict[str, Path]) -> None:
    """Weights, and the statistics of each step: 1e-5, as for ranks that share nothing."""
    kind, _, _, config = CASES[case]
    history, expected = reference_run(models[kind], **config)
    check(two_ranks, case, history, expected)
    assert relative_weights(expected, two_ranks[0][case]["before"]) > 1e-3


def test_shared_rows_form_the_heads_logits_once(two_ranks: Any) -> None:
    """Where the loss is a sum over tokens; gspo's (qwen2-2) needs them again."""
    for rank in two_ranks:
        passes, formed = rank["gemma3-3"]["head"]
        assert passes == formed > 0
        assert rank["qwen2-2"]["head"][1] > rank["qwen2-2"]["head"][0]


@pytest.mark.parametrize("case", ["train-2", "train-3", "small buckets"])
def test_offload_and_many_buckets_equal_the_reference(
    case: str, two_ranks: Any, models: dict[str, Path]
) -> None:
    """AdamW stays torch's under offload: nothing is compiled.

    In many buckets, the two gradients of a tied embedding meet after others have left.
    """
    check(two_ranks, case, *reference_run(models["qwen2"], **MANY))


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_offloaded_state_resumes_bit_for_bit(stage: int, two_ranks: Any) -> None:
    for rank in two_ranks:
        resumed, expected = rank[f"resume-{stage}"], rank[f"uninterrupted-{stage}"]
        assert resumed["num_updates"] == 2
        assert all(torch.equal(resumed["after"][n], t) for n, t in expected["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_four_ranks(size: int, models: dict[str, Path], tmp_path: Path) -> None:
    """Two groups of two, and one of four, which is more than there are key heads (2)."""
    learner = {"sequence_parallel": size, "deepspeed": SHARDED}
    cases = {"four": make_case(models["llama"], 3, "train", **MANY, learner=learner)}
    ranks = run_cases(tmp_path / "four", 4, cases)
    _, expected = reference_run(models["llama"], **MANY)
    for rank in ranks:
        assert relative_weights(rank["four"]["after"], expected) < 1e-5
    assert [not any(rank["four"]["history"]) for rank in ranks] == [r % size > 0 for r in range(4)]


def gemma2(path: Path, **changes: Any) -> Path:
    """A tiny Gemma 2, whose attention caps its logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=len(tiny_tokenizer()), **sizes, **heads, **changes)
    Gemma2ForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_an_attention_that_does_more_is_refused(tmp_path: Path) -> None:
    """By the configuration alone, before weights are loaded; with one rank it trains."""
    from transformers import AutoConfig

    from raygrpo.models import load_model

    path = gemma2(tmp_path)
    config = AutoConfig.from_pretrained(path)
    with pytest.raises(ConfigError, match=r"sequence_parallel is 2, .*'gemma2' caps its logits"):
        check_attention(config, 2)
    check_attention(config, 1)
    # What has no name in the configuration shows in what the model was loaded with.
    section = make_config(path).model
    model = load_model(section, seed=0, dtype=torch.float32)
    model.config.attn_logit_softcapping = None
    with pytest.raises(ConfigError, match="is not that of SDPA"):
        SequenceShard(model, rank=0, num_ranks=2, size=2)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_no_option_of_attention_is_swallowed(option: str) -> None:
    values = torch.zeros(1, 2, 3, 4)
    attention = UlyssesAttention(None, 1)
    with pytest.raises(ValueError, match=f"{option} is not known by sequence parallelism"):
        attention(None, values, values, values, None, **{option: torch.ones(())})
    with pytest.raises(ValueError, match=f"{option} is not known by segments"):
        refuse_unknown({option: 30.0}, "segments")
    refuse_unknown({option: None, "dropout": 0.0}, "segments")


def test_heads_that_cannot_be_divided_are_refused() -> None:
    from tests.tiny import tiny_config

    model = type("Model", (), {"config": tiny_config("llama")})
    with pytest.raises(ConfigError, match="does not divide the model's 4 heads"):
        SequenceShard(model, rank=0, num_ranks=3, size=3)
