"""DeepSpeedLearner in real processes over gloo, against the plain-torch ReferenceLearner."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raygrpo.config import ModelSection
from raygrpo.errors import ConfigError
from raygrpo.learner.deepspeed_config import deepspeed_config
from raygrpo.models import load_model
from raygrpo.types import Stat, merge_stats
from tests import builders
from tests.close import relative_weights
from tests.parity import deepspeed_worker
from tests.parity.learner_cases import (
    make_config,
    make_steps,
    microbatch,
    random_trees,
    separate,
    wide_logprobs,
)
from tests.parity.ranks import run_ranks
from tests.parity.reference_learner import ReferenceLearner

STAGES = (0, 1, 2, 3)
# Where all stages share code but for DeepSpeed's own, two of them stand for all without --slow.
EDGES = (0, 3)
NUM_STEPS = 3
# Measured: 1e-7 of the weights' norm; ranks add gradients up in another order than one process.
RELATIVE = 1e-5

# Several updates a step, so that all rules for the old logprobs act, with a KL and a tied head.
MANY_UPDATES = {
    "loss": {"beta": 0.1, "kl_unbiased": True},
    "train": {"num_minibatches": 2, "num_iterations": 2},
}
# Gemma's gradients are smaller; clipping is to act in every update.
MANY_OF_GEMMA = {**MANY_UPDATES, "optimizer": {"max_grad_norm": 0.02}}
# What is global over ranks or has a memory: sequence ratios, the threshold of top entropies, an
# adaptive entropy bonus, a reference that moves.
FORKS = {
    "loss": {
        "loss": "gspo",
        "clip_low": 0.01,
        "clip_high": 0.01,
        "beta": 0.1,
        "top_entropy_frac": 0.4,
        "entropy_coef": 0.02,
        "entropy_target": 9.0,
        "off_policy_threshold": 0.5,
    },
    "train": {"num_minibatches": 2},
    "learner": {"reference": {"sync_steps": 2, "sync_alpha": 0.3}},
    "optimizer": {"max_grad_norm": 0.005},
}

pytestmark = pytest.mark.timeout(600)
SLOW = pytest.mark.slow


def run_cases(
    directory: Path, num_ranks: int, cases: dict[str, Any], *, exitcode: int = 0
) -> list[dict[str, Any]]:
    """Runs the cases one after the other in one process group; returns what each rank saw."""
    for case in cases.values():
        case["config"]["learner"]["num_ranks"] = num_ranks
    return run_ranks(deepspeed_worker.run_cases, num_ranks, directory, cases, exitcode=exitcode)


def edges_first(stages: Sequence[int] = STAGES) -> list[Any]:
    """The stages as parameters, those between the edges for --slow."""
    return [stage if stage in EDGES else pytest.param(stage, marks=SLOW) for stage in stages]


def chosen(request: pytest.FixtureRequest, stages: Sequence[int] = STAGES) -> Sequence[int]:
    """The stages that `edges_first` runs."""
    return [s for s in stages if s in EDGES or request.config.getoption("--slow")]


def make_case(path: Path, stage: int, scenario: str, /, **config: Any) -> dict[str, Any]:
    config["learner"] = {**config.get("learner", {}), "zero_stage": stage}
    return {"model": str(path), "scenario": scenario, "steps": NUM_STEPS, "config": config}


@pytest.fixture(scope="module")
def two_ranks(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Training and poisoned steps on two ranks, fp32 and bf16."""
    qwen2, llama, bf16 = models["qwen2"], models["llama"], {"model": {"dtype": "bfloat16"}}
    cases = {}
    for stage in STAGES:
        cases[f"train-{stage}"] = make_case(qwen2, stage, "train", **MANY_UPDATES)
    for stage in chosen(request):
        cases[f"forks-{stage}"] = make_case(qwen2, stage, "train", **FORKS)
        cases[f"nan-{stage}"] = make_case(qwen2, stage, "nan_loss")
        cases[f"bf16-train-{stage}"] = make_case(llama, stage, "train", **bf16)
        cases[f"bf16-nan-{stage}"] = make_case(llama, stage, "nan_loss", **bf16)
        cases[f"bf16-gradient-{stage}"] = make_case(llama, stage, "infinite_gradient", **bf16)
    wide = {"model": {"dtype": "bfloat16", "fp32_head": True}}
    cases["head-3"] = make_case(qwen2, 3, "fp32_head", **wide)
    recompute = {"gradient_checkpointing": True}
    cases["recompute-3"] = make_case(qwen2, 3, "train", **MANY_UPDATES, learner=recompute)
    # Sharding every parameter, however small, is what a large model sees.
    shard_all = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    cases["sharded-3"] = make_case(qwen2, 3, "train", **MANY_UPDATES, learner=shard_all)
    return run_cases(tmp_path_factory.mktemp("ranks") / "two", 2, cases)


@pytest.fixture(scope="module")
def one_rank(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    saved: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """fp32 on one rank: training, a bad gradient behind a finite loss, a bad load."""
    gemma3 = models["gemma3"]
    cases = {}
    for stage in chosen(request):
        cases[f"train-{stage}"] = make_case(
            gemma3, stage, "train", **MANY_OF_GEMMA, deterministic=True
        )
        cases[f"gradient-{stage}"] = make_case(gemma3, stage, "infinite_gradient")
    cases["forks-3"] = make_case(gemma3, 3, "train", **FORKS)
    cases["refused"] = make_case(models["qwen2"], 2, "refused_load")
    cases["refused"]["directory"] = str(saved / "fp32-2" / "view-0")
    return run_cases(tmp_path_factory.mktemp("ranks") / "one", 1, cases)


def reference_run(model: Path, **config: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    learner = ReferenceLearner(make_config(model, **config))
    steps = make_steps(NUM_STEPS, learner.config.train.num_minibatches, 1)
    history = [learner.update(step[0]) for step in steps]
    return history, dict(learner.named_weights())


def check(
    ranks: list[dict[str, Any]],
    case: str,
    history: list[dict[str, Stat]],
    expected: dict[str, Tensor],
    *,
    rel: float = 1e-4,
    floor: float = 1e-5,
) -> None:
    """Weights, and each statistic of each step, of all ranks together."""
    for rank in ranks:
        assert relative_weights(rank[case]["after"], expected) < RELATIVE
    steps = zip(*(rank[case]["history"] for rank in ranks), strict=True)
    for ours, theirs in zip(map(merge_stats, map(list, steps)), history, strict=True):
        assert set(ours) == set(theirs)
        for name, stat in theirs.items():
            assert ours[name].count == stat.count, name
            # Sums in another order, of weights that AdamW moved by rounding, too.
            assert ours[name].sum == pytest.approx(stat.sum, rel=rel, abs=floor), name


def check_against_reference(
    ranks: list[dict[str, Any]], case: str, model: Path, **config: Any
) -> None:
    history, expected = reference_run(model, **config)
    bound = make_config(model, **config).optimizer.max_grad_norm
    for step in history:
        assert step["grad_norm"].min > 2 * bound, "clipping must act, or the test proves less"
    # The KL, a difference of close logprobs, rounds most: it alone needs more than 1e-5.
    check(ranks, case, history, expected, rel=3e-5, floor=1e-6)


@pytest.mark.parametrize("case", [*(f"train-{s}" for s in STAGES), "recompute-3", "sharded-3"])
def test_two_ranks_equal_the_reference_learner(
    case: str, two_ranks: Any, models: dict[str, Path]
) -> None:
    check_against_reference(two_ranks, case, models["qwen2"], **MANY_UPDATES)


@pytest.mark.parametrize("stage", edges_first())
def test_one_rank_equals_the_reference_learner(
    stage: int, one_rank: Any, models: dict[str, Path]
) -> None:
    check_against_reference(one_rank, f"train-{stage}", models["gemma3"], **MANY_OF_GEMMA)


@pytest.mark.parametrize("stage", edges_first())
def test_global_masks_and_memories_on_two_ranks(
    stage: int, two_ranks: Any, models: dict[str, Path]
) -> None:
    check_against_reference(two_ranks, f"forks-{stage}", models["qwen2"], **FORKS)


def test_global_masks_and_memories_on_one_rank(one_rank: Any, models: dict[str, Path]) -> None:
    check_against_reference(one_rank, "forks-3", models["gemma3"], **FORKS)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_starts_from_the_weights_of_a_plain_load(
    stage: int, two_ranks: Any, models: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["qwen2"], dtype=torch.float32)
    expected = dict(model.named_parameters())
    for rank in two_ranks:
        before = rank[f"train-{stage}"]["before"]
        assert list(before) == list(expected)
        assert all(torch.equal(before[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", edges_first())
def test_nan_on_one_rank_is_skipped_by_all_and_leaves_no_trace(
    stage: int, two_ranks: Any, models: dict[str, Path]
) -> None:
    check_skipped(two_ranks, f"nan-{stage}")
    check_skipped(two_ranks, f"bf16-nan-{stage}")
    check_as_if_not_there(two_ranks, f"nan-{stage}", models["qwen2"])


@pytest.mark.parametrize("stage", edges_first())
def test_a_gradient_that_is_not_finite_is_skipped(
    stage: int, one_rank: Any, two_ranks: Any, models: dict[str, Path]
) -> None:
    """Behind a finite loss; in bf16 on one of two ranks."""
    check_skipped(one_rank, f"gradient-{stage}")
    check_skipped(two_ranks, f"bf16-gradient-{stage}")
    check_as_if_not_there(one_rank, f"gradient-{stage}", models["gemma3"])


def check_skipped(ranks: list[dict[str, Any]], case: str) -> None:
    """The weights stay, training goes on, and the fourth bad update in a row is an error."""
    for index, rank in enumerate(ranks):
        report = rank[case]
        before, skipped, after = report["before"], report["skipped"], report["after"]
        assert all(torch.equal(skipped[name], before[name]) for name in before)
        assert any(not torch.equal(after[name], before[name]) for name in before)
        assert all(bool(value.isfinite().all()) for value in after.values())
        assert list(report["stats"]) == (["skipped_updates_frac"] if index == 0 else [])
        assert report["raised"].startswith("NumericError: 4 optimizer updates in a row")
        assert report["count"] == 4
        assert all(torch.equal(report["end"][name], after[name]) for name in after)


def check_as_if_not_there(ranks: list[dict[str, Any]], case: str, model: Path) -> None:
    """A skipped update counts for the schedule and leaves no gradient or momentum behind."""
    learner = ReferenceLearner(make_config(model))
    first, _, third = make_steps(3, 1, 1)
    learner.update(first[0])
    learner.update((), skip=True)
    learner.update(third[0])
    for rank in ranks:
        assert relative_weights(rank[case]["after"], dict(learner.named_weights())) < RELATIVE


@pytest.mark.parametrize("stage", edges_first())
def test_bf16_publishes_the_rounded_masters(stage: int, two_ranks: Any) -> None:
    for rank in two_ranks:
        report = rank[f"bf16-train-{stage}"]
        masters, after, before = report["masters"], report["after"], report["before"]
        assert list(masters) == list(after)
        for name, master in masters.items():
            assert master.dtype == torch.float32 and after[name].dtype == torch.bfloat16
            assert torch.equal(after[name], master.bfloat16())
        assert any(not torch.equal(masters[n], masters[n].bfloat16().float()) for n in masters)
        assert any(not torch.equal(after[n], before[n]) for n in after)


@pytest.mark.parametrize("stage", edges_first())
def test_bf16_ranks_hold_the_same_weights(stage: int, two_ranks: Any) -> None:
    first, second = (rank[f"bf16-train-{stage}"]["after"] for rank in two_ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bf16_trains_as_fp32_does(two_ranks: Any, models: dict[str, Path]) -> None:
    """Loosely: 8 bits of precision, and AdamW divides small differences by small gradients."""
    history, _ = reference_run(models["llama"])
    for stage in EDGES:
        ours = two_ranks[0][f"bf16-train-{stage}"]["history"]
        for step, expected in zip(ours, history, strict=True):
            assert step["grad_norm"].sum == pytest.approx(expected["grad_norm"].sum, rel=0.05)


def test_an_fp32_head_under_zero_3(two_ranks: Any, models: dict[str, Path]) -> None:
    """A tied one, against one process and the product written out; `test_learner.py` has more."""
    section = ModelSection(path=str(models["qwen2"]), dtype="bfloat16")
    total: list[Tensor] = []
    for index, rank in enumerate(two_ranks):
        batch = microbatch(separate(random_trees(index, 2)))
        found = wide_logprobs(load_model(section, seed=0, dtype=torch.bfloat16), batch, 0.8)
        mask = torch.tensor(batch.loss_mask)
        assert (
            float(
                (torch.tensor(rank["head-3"]["scores"])[mask] - found.logprobs.detach()).abs().max()
            )
            < 1e-5
        )
        gradients = [g.float() for g in found.gradients(batch).values()]
        total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
    norm = float(torch.cat([g.flatten() for g in total]).norm())
    stats = merge_stats([rank["head-3"]["stats"] for rank in two_ranks])
    # With a bfloat16 product it is 3e-4 away.
    assert stats["grad_norm"].sum == pytest.approx(norm, rel=1e-4)


# Checkpoints: every stage in fp32, the other optimizers that bf16 gets, and a frozen reference.
SAVED = {
    **{f"fp32-{stage}": (stage, "float32") for stage in STAGES},
    **{f"bf16-{stage}": (stage, "bfloat16") for stage in (0, 1, 3)},
}
# Stage 2 is the one that others refuse to load.
SAVED_QUICK = ("fp32-0", "fp32-2", "fp32-3", "bf16-3")


def saved_names(request: pytest.FixtureRequest) -> list[str]:
    return [n for n in SAVED if n in SAVED_QUICK or request.config.getoption("--slow")]


def saved_case(name: str, model: Path, root: Path, scenario: str, **job: Any) -> dict[str, Any]:
    stage, dtype = SAVED[name]
    bonus = {"entropy_coef": 0.01, "entropy_target": 9.0}
    config: dict[str, Any] = {
        "loss": {"beta": 0.1, **bonus},
        "model": {"dtype": dtype},
        "learner": {"reference": {"sync_steps": 1, "sync_alpha": 0.5}},
    }
    case = make_case(model, stage, scenario, **config)
    return {**case, "directory": str(root / name), **job}


@pytest.fixture(scope="module")
def saved(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Checkpoints of killed processes, each rank's in a directory that only it sees."""
    root = tmp_path_factory.mktemp("saved")
    cases = {}
    names = saved_names(request)
    for name in names:
        (root / name).mkdir()
        last = name == names[-1]
        cases[name] = saved_case(name, models["qwen2"], root, "save_and_die", die=last)
    run_cases(root / "job", 2, cases, exitcode=-signal.SIGKILL)
    return root


@pytest.fixture(scope="module")
def resumed(
    request: pytest.FixtureRequest, saved: Path, models: dict[str, Path]
) -> list[dict[str, Any]]:
    """Fresh processes that load them, some after an update that must leave no trace."""
    model = models["qwen2"]
    cases = {
        name: saved_case(name, model, saved, "resume", dirty=name.startswith("fp32"))
        for name in saved_names(request)
    }
    refused = saved_case("fp32-2", model, saved, "refused_load")
    cases["other stage"] = {**refused, "directory": str(saved / "fp32-3" / "view-0")}
    # Rank 1 finds no file of its own here; rank 0 would wait for it for ever if it went on.
    missing = saved_case("fp32-2", model, saved, "refused_load")
    cases["missing file"] = {**missing, "directory": str(saved / "fp32-2" / "view-0")}
    return run_cases(saved / "resume", 2, cases)


@pytest.mark.parametrize(
    "name", [n if n in SAVED_QUICK else pytest.param(n, marks=SLOW) for n in SAVED]
)
def test_resume_is_bit_exact(name: str, saved: Path, resumed: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(resumed):
        expected = torch.load(saved / name / f"uninterrupted-{rank}.pt", weights_only=False)
        assert results[name]["num_updates"] == 2
        assert torch.equal(results[name]["random"], expected["random"])
        after = results[name]["after"]
        assert list(after) == list(expected["weights"])
        assert all(torch.equal(after[n], expected["weights"][n]) for n in after)


def test_ranks_have_random_states_of_their_own(resumed: list[dict[str, Any]]) -> None:
    first, second = (results["fp32-2"]["random"] for results in resumed)
    assert not torch.equal(first, second)


def test_another_stage_is_refused_before_the_engine_is_touched(
    resumed: list[dict[str, Any]],
) -> None:
    for results in resumed:
        report = results["other stage"]
        assert report["raised"].startswith("ConfigError")
        assert "learner.zero_stage: 3" in report["raised"]
        assert "learner.zero_stage: 2" in report["raised"]
        assert all(torch.equal(report["after"][n], v) for n, v in report["before"].items())


def test_a_file_missing_on_one_rank_stops_all(resumed: list[dict[str, Any]]) -> None:
    first, second = (results["missing file"] for results in resumed)
    assert first["raised"].startswith("StorageError: 1 other ranks cannot load")
    assert second["raised"].startswith("StorageError") and "is missing" in second["raised"]
    assert all(torch.equal(first["after"][n], v) for n, v in first["before"].items())


def test_another_rank_count_is_refused(one_rank: Any) -> None:
    report = one_rank[0]["refused"]
    assert report["raised"].startswith("ConfigError")
    assert "learner.num_ranks: 2" in report["raised"] and "learner.num_ranks: 1" in report["raised"]
    assert all(torch.equal(report["after"][n], v) for n, v in report["before"].items())


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("gradient_clipping", "optimizer.max_grad_norm"),
        ("train_batch_size", "train.groups_per_step"),
        ("optimizer", "optimizer.lr"),
        ("scheduler", "optimizer.schedule"),
        ("bf16", "model.dtype"),
        ("communication_data_type", "use checkpoint, comms_logger"),
        ("zero_optimisation", "zero_optimization"),
    ],
)
def test_deepspeed_keys_that_change_the_update_are_refused(key: str, instead: str) -> None:
    config = make_config("model", learner={"deepspeed": {key: 1}})
    with pytest.raises(ConfigError, match=f"learner.deepspeed.{key}") as raised:
        deepspeed_config(config)
    assert instead in str(raised.value)


@pytest.mark.parametrize("what", ["weights", "gradients", "nontrainable_weights"])
def test_what_is_trained_is_not_quantized(what: str) -> None:
    quantized = {"zero_optimization": {f"zero_quantized_{what}": True}}
    with pytest.raises(ConfigError, match=f"zero_quantized_{what} would round what is trained"):
        deepspeed_config(make_config("model", learner={"deepspeed": quantized}))
    quantized["zero_optimization"][f"zero_quantized_{what}"] = False
    deepspeed_config(make_config("model", learner={"deepspeed": quantized}))


def test_the_users_deepspeed_section_is_merged() -> None:
    user = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    settings = deepspeed_config(make_config("model", learner={"deepspeed": user, "zero_stage": 2}))
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["wall_clock_breakdown"] is True


def test_clipping_is_always_set() -> None:
    """DeepSpeed clips to 1.0 where nothing is said."""
    config = builders.config(optimizer={"max_grad_norm": 0})
    assert deepspeed_config(config)["gradient_clipping"] == 0.0
