"""The policy and the step logic, through the reference learner, against loops written here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.config import ModelSection, OptimizerSection
from raygrpo.errors import ConfigError, NumericError, StorageError
from raygrpo.learner.inputs import policy_inputs
from raygrpo.learner.loading import find_layout, load_policy
from raygrpo.learner.policy import PolicyModel
from raygrpo.learner.schedule import learning_rate
from raygrpo.learner.watch import PATIENCE, MovementWatch
from raygrpo.models import load_model
from raygrpo.types import Microbatch
from tests.close import relative
from tests.parity.conftest import KINDS
from tests.parity.learner_cases import (
    Tree,
    filler,
    make_config,
    microbatch,
    random_trees,
    separate,
    wide_logprobs,
)
from tests.parity.reference_learner import ReferenceLearner

CPU = torch.device("cpu")
# fp32 sums in another order (other shapes of matrix products, other microbatches).
RELATIVE = 1e-5
LOGPROB_TOLERANCE = 1e-4


def load(path: Path, **options: Any) -> PolicyModel:
    options = {"temperature": 0.8, **options}
    return load_policy(ModelSection(path=str(path)), seed=0, dtype=torch.float32, **options)


def hf_logprobs(model: Any, tree: Tree, temperature: float) -> list[Tensor]:
    """Each completion's token logprobs, from the model's own logits on its own sequence."""
    found = []
    for branch in tree.branches:
        ids = torch.tensor(np.concatenate([tree.prompt, branch.tokens]))[None]
        table = torch.log_softmax(model(ids).logits[0].float() / temperature, -1)
        picked = table[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        found.append(picked[tree.prompt.size - 1 :] * torch.tensor(branch.loss_mask))
    return found


def by_sequence(values: Tensor, batch: Microbatch) -> list[Tensor]:
    """Cuts [B, T] into completions."""
    ids = torch.tensor(batch.sequence_ids)
    return [values[ids == index] for index in range(len(batch.advantages))]


def gradient(policy: PolicyModel, batches: Sequence[Microbatch]) -> Tensor:
    """The gradient of a weighted sum of logprobs, as one vector."""
    policy.zero_grad()
    for batch in batches:
        logprobs, _ = policy(policy_inputs(batch, CPU))
        weights = torch.tensor(batch.advantages * batch.loss_weights)
        (logprobs * weights[torch.tensor(batch.sequence_ids).clamp(min=0)]).sum().backward()
    return torch.cat([p.grad.flatten().clone() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_the_models_own_logits(kind: str, models: dict[str, Path]) -> None:
    policy, trees = load(models[kind]), separate(random_trees(3, 4))
    batch = microbatch(trees)
    with torch.no_grad():
        logprobs, entropies = policy(policy_inputs(batch, CPU))
        expected = [hf_logprobs(policy.model, tree, 0.8)[0] for tree in trees]
    for ours, theirs in zip(by_sequence(logprobs, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=LOGPROB_TOLERANCE, rtol=0)
    outside = ~torch.tensor(batch.loss_mask)
    assert not logprobs[outside].any() and not entropies[outside].any()
    assert float(entropies[~outside].min()) > 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_an_fp32_head_in_bfloat16(kind: str, fused: bool, models: dict[str, Path]) -> None:
    """Tied and untied, value and gradient, against a float32 product on the model's own states."""
    section = ModelSection(path=str(models[kind]), dtype="bfloat16")
    batch = microbatch(separate(random_trees(3, 4)))
    inputs = policy_inputs(batch, CPU)
    found = wide_logprobs(load_model(section, seed=0, dtype=torch.bfloat16), batch, 0.8)
    expected = found.gradients(batch)
    weights = torch.tensor((batch.advantages * batch.loss_weights)[batch.sequence_ids])
    weights = weights[torch.tensor(batch.loss_mask)]
    values, gradients = [], []
    for fp32 in (True, False):
        policy = load_policy(
            section.model_copy(update={"fp32_head": fp32}),
            seed=0,
            dtype=torch.bfloat16,
            temperature=0.8,
        )
        given = replace(inputs, expected_grad=(lambda w, *_: (weights[w], None)) if fused else None)
        logprobs = policy(given)[0][inputs.loss_mask]
        (logprobs * weights).sum().backward()
        values.append(float((logprobs - found.logprobs).detach().abs().max()))
        named = dict(policy.model.named_parameters())
        gradients.append(
            {n: relative(p.grad.float(), expected[n].float()) for n, p in named.items()}  # type: ignore[union-attr]
        )
    # float32 sums in another order, then one rounding; against logits of 8 bits.
    assert values[0] < 1e-5 and values[1] > 1e-3
    assert max(gradients[0].values()) < 1e-5 and min(gradients[1].values()) > 1e-3


def test_an_fp32_head_that_is_no_linear_layer_is_refused(models: dict[str, Path]) -> None:
    model = load(models["llama"]).model
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ConfigError, match=r"model\.fp32_head: the language head is a Sequential"):
        PolicyModel(model, fp32_head=True)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 11), max_size=6))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_gradient_does_not_depend_on_the_split(
    kind: str, seed: int, cuts: list[int], models: dict[str, Path]
) -> None:
    policy, trees = load(models[kind]), separate(random_trees(seed, 4))
    np.random.default_rng(seed).shuffle(trees)  # type: ignore[arg-type]
    edges = [0, *sorted(set(cuts)), len(trees)]
    parts = [trees[a:b] for a, b in itertools.pairwise(edges) if a < b]
    whole = gradient(policy, [microbatch(trees)])
    split = gradient(policy, [*(microbatch(part) for part in parts), filler()])
    assert relative(split, whole) < RELATIVE


def test_activation_checkpointing_recomputes_and_changes_nothing(models: dict[str, Path]) -> None:
    trees = random_trees(7, 2)
    counts, gradients = [], []
    for enabled in (False, True):
        policy = load(models["llama"], gradient_checkpointing=enabled)
        calls: list[int] = []
        first = policy.model.base_model.layers[0].mlp
        # Before its forward, because the recomputation may stop inside the last module.
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        gradients.append(gradient(policy, [microbatch(trees)]))
        counts.append(len(calls))
    assert counts == [1, 2]
    assert relative(gradients[1], gradients[0]) < RELATIVE


def test_dropout_is_off_even_in_training_mode(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=1, n_head=2, **rates)
    ).save_pretrained(tmp_path)
    policy = load(tmp_path, gradient_checkpointing=True)
    assert policy.training and policy.layout != "plain"
    batch = policy_inputs(microbatch(random_trees(1, 2)), CPU)
    assert torch.equal(policy(batch)[0], policy(batch)[0])


def test_an_unknown_way_to_make_logits_is_refused(tmp_path: Path) -> None:
    """Falcon-H1 multiplies its logits by a factor that no other model has."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    sizes = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    factor = {"lm_head_multiplier": 3.0, "initializer_range": 0.5}
    config = FalconH1Config(vocab_size=60, mamba_n_groups=1, **sizes, **heads, **layers, **factor)
    FalconH1ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'falcon_h1'"):
        load(tmp_path)


def test_a_model_that_takes_no_four_dimensional_mask_does_not_share_prompts(
    tmp_path: Path,
) -> None:
    """Falcon with ALiBi makes its position bias from a mask of padding."""
    from transformers import FalconConfig, FalconForCausalLM

    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = FalconConfig(vocab_size=60, alibi=True, new_decoder_architecture=False, **layers)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    assert load(tmp_path).layout == "plain"


def test_a_mask_that_goes_wrong_silently_does_not_share_prompts(models: dict[str, Path]) -> None:
    """What the shared row computes is compared, not only whether it runs."""
    policy = load(models["llama"])
    policy.model.base_model.register_forward_pre_hook(_drop_mask, with_kwargs=True)
    assert find_layout(policy.model) == "plain"


def _drop_mask(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": None}


def plain_grpo_loss(
    logprobs: Sequence[Tensor], old: Sequence[Tensor], ref: Sequence[Tensor], trees: list[Tree]
) -> Tensor:
    """Clipped objective and k3, written out token by token; clip 0.1 and 0.15, beta 0.1."""
    total = torch.zeros(())
    for new, before, frozen, tree in zip(logprobs, old, ref, trees, strict=True):
        branch = tree.branches[0]
        for t in np.nonzero(branch.loss_mask)[0]:
            ratio = torch.exp(new[t] - before[t].detach())
            bounded = ratio.clamp(0.9, 1.15)
            gain = torch.minimum(ratio * branch.advantage, bounded * branch.advantage)
            gap = frozen[t].detach() - new[t]
            total = total + branch.loss_weight * (0.1 * (torch.exp(gap) - gap - 1) - gain)
    return total


@pytest.mark.parametrize(("num_minibatches", "num_iterations"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_old_logprobs_and_the_reference_follow_the_rules(
    num_minibatches: int, num_iterations: int, models: dict[str, Path]
) -> None:
    """A serial loop over the model's own logits, torch's AdamW, and l_old taken by the book."""
    config = make_config(
        models["gemma3"],
        loss={"beta": 0.1},
        train={"num_minibatches": num_minibatches, "num_iterations": num_iterations, "steps": 2},
        optimizer={"lr": 1e-2, "warmup_updates": 0, "adamw": {"weight_decay": 0.1}},
    )
    learner = ReferenceLearner(config)
    model = load(models["gemma3"]).model
    frozen = load(models["gemma3"]).model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    total, done = 2 * num_minibatches * num_iterations, 0
    for step in range(2):
        minibatches = [separate(random_trees(50 * step + i, 2, 2)) for i in range(num_minibatches)]
        stats = learner.update([[microbatch(trees)] for trees in minibatches])
        assert stats["grad_norm"].count == num_minibatches * num_iterations
        with torch.no_grad():
            old, ref = (
                [[hf_logprobs(m, tree, 0.8)[0] for tree in trees] for trees in minibatches]
                for m in (model, frozen)
            )
        norms = []
        for _ in range(num_iterations):
            for index, trees in enumerate(minibatches):
                logprobs = [hf_logprobs(model, tree, 0.8)[0] for tree in trees]
                plain_grpo_loss(logprobs, old[index], ref[index], trees).backward()
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
                optimizer.param_groups[0]["lr"] = 1e-2 * (1 - done / total)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
        assert stats["grad_norm"].sum == pytest.approx(sum(norms), rel=1e-4)
        if len(norms) > 1:
            assert stats["clip_ratio/region_mean"].sum > 0, "the ratio must leave the clip range"
    pairs = zip(learner.named_weights(), model.named_parameters(), strict=True)
    for (name, ours), (expected_name, theirs) in pairs:
        assert name == expected_name
        # AdamW divides rounding in small gradients by those gradients: looser than the sums.
        assert relative(ours, theirs.detach()) < 1e-4


def test_skip_advances_only_the_counter(models: dict[str, Path]) -> None:
    train = {"num_iterations": 3, "num_minibatches": 2}
    learner = ReferenceLearner(make_config(models["llama"], train=train))
    before = dict(learner.named_weights())
    assert learner.update([], skip=True) == {}
    assert learner.num_updates == 6
    assert all(torch.equal(w, before[name]) for name, w in learner.named_weights())


def test_a_minibatch_without_rows_counts_but_moves_nothing(models: dict[str, Path]) -> None:
    learner = ReferenceLearner(make_config(models["llama"]))
    learner.update([[microbatch(random_trees(0, 1))]])
    before = dict(learner.named_weights())
    assert "grad_norm" not in learner.update([[]])
    assert learner.num_updates == 2
    assert all(torch.equal(w, before[name]) for name, w in learner.named_weights())


def test_named_weights_load_into_the_hugging_face_model(models: dict[str, Path]) -> None:
    learner = ReferenceLearner(make_config(models["qwen2"]))
    learner.update([[microbatch(random_trees(0, 2))]])
    weights = dict(learner.named_weights())
    assert "lm_head.weight" not in weights, "tied weights come once"
    model = load(models["qwen2"]).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights
    trees = separate(random_trees(1, 2))
    scores = by_sequence(torch.tensor(learner.score(microbatch(trees))), microbatch(trees))
    for ours, tree in zip(scores, trees, strict=True):
        torch.testing.assert_close(
            ours, hf_logprobs(model, tree, 0.8)[0].detach(), atol=LOGPROB_TOLERANCE, rtol=0
        )


def test_nan_is_skipped_within_a_budget(models: dict[str, Path]) -> None:
    learner = ReferenceLearner(make_config(models["llama"]))
    before = dict(learner.named_weights())
    batch = microbatch(random_trees(0, 1))
    poisoned = dataclasses.replace(batch, advantages=batch.advantages * np.float32("nan"))
    for _ in range(3):
        stats = learner.update([[batch, poisoned]])
        assert stats["skipped_updates_frac"].mean == 1
    with pytest.raises(NumericError, match="4 optimizer updates in a row"):
        learner.update([[batch, poisoned]])
    assert all(torch.equal(w, before[name]) for name, w in learner.named_weights())
    assert learner.update([[batch]])["skipped_updates_frac"].mean == 0
    assert learner.update([[batch, poisoned]])["skipped_updates_frac"].mean == 1


def watched(
    weights: dict[str, Tensor], rates: Sequence[float], *, frozen: str = ""
) -> tuple[int, str]:
    """AdamW at these rates on fp32 weights that all have a gradient, watched.

    Returns how often the watch looked at the weights, and the text of its error, if any.
    """
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    looks = []

    def masters() -> Iterable[tuple[str, Tensor]]:
        looks.append(1)
        return parameters.items()

    watch = MovementWatch(parameters, masters, lambda value: value)
    optimizer = torch.optim.AdamW(
        [p for name, p in parameters.items() if name != frozen], weight_decay=0.0
    )
    for rate in rates:
        sum((p * torch.linspace(0.5, 1, p.numel())).sum() for p in parameters.values()).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        try:
            watch.after_update(1.0, rate)
        except NumericError as error:
            return len(looks), str(error)
    return len(looks), ""


def test_rates_too_small_to_move_a_weight_are_not_counted() -> None:
    """1 - 2e-8 is 1 in fp32: a long warm-up moves such a tensor late, which is no error."""
    weights = {"norm": torch.ones(4), "small": torch.full((4,), 1e-3)}
    # A look at the start and after each of the first updates.
    assert watched(weights, [2e-8] * 20) == (1 + PATIENCE, "")
    # The next rate moves the last tensor, and there is no look after that.
    for more in (1, 3):
        assert watched(weights, [2e-8] * 20 + [1e-6] * more) == (2 + PATIENCE, "")
    # Large values alone do not make a tensor suspicious, nor do small ones beside them hide it.
    assert watched({"wide": torch.tensor([1e-4, 100.0])}, [1e-6] * 3) == (2, "")


def test_a_frozen_weight_is_found_once_rates_could_have_moved_it() -> None:
    weights = {"norm": torch.ones(4), "other": torch.ones(4)}
    slow, fast = [2e-8] * 20, [1e-6] * PATIENCE
    assert watched(weights, slow, frozen="norm")[1] == ""
    assert watched(weights, slow + fast[:-1], frozen="norm")[1] == ""
    assert watched(weights, slow + fast, frozen="norm")[1].startswith(
        "after 28 optimizer updates 1 tensors have not moved, the first being norm"
    )


def test_a_parameter_that_the_models_code_freezes_is_refused(tmp_path: Path) -> None:
    """Ernie 4.5 has parameters without gradient in its routers. (What reads saved weights makes
    them trainable; that they are not reached is then found in the first updates.)"""
    from transformers import Ernie4_5_MoeConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8}
    config = Ernie4_5_MoeConfig(
        vocab_size=60, moe_layer_start_index=1, moe_layer_end_index=1, **sizes, **heads, **experts
    )
    config.save_pretrained(tmp_path)
    fresh = {"model": {"random_init": True}}
    name = r"model\.layers\.1\.mlp\..*e_score_correction_bias"
    with pytest.raises(ConfigError, match=rf"freezes 1 of its tensors, the first being {name}"):
        ReferenceLearner(make_config(tmp_path, **fresh))
    lora = {"lora": {"r": 2, "target_modules": ["q_proj"]}}
    assert ReferenceLearner(make_config(tmp_path, **fresh, learner=lora)).num_updates == 0


def test_bad_checkpoints_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    learner = ReferenceLearner(make_config(models["qwen2"]))
    with pytest.raises(StorageError, match="cannot read"):
        learner.load(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="no learner checkpoint"):
        learner.load(tmp_path)
    learner.save(tmp_path)
    with pytest.raises(ConfigError, match="another model"):
        ReferenceLearner(make_config(models["llama"])).load(tmp_path)
    file = tmp_path / "rank-0-of-1.pt"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(StorageError, match="cannot read"):
        learner.load(tmp_path)


def test_linear_without_warmup_is_transformers_schedule() -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 20)
    section = OptimizerSection(lr=3e-4, schedule="linear")
    for update in range(20):
        assert learning_rate(update, 20, section) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 2, 3, 3, 3, 3, 3]),
        ("linear", [1, 2, 3, 2.25, 1.5, 0.75, 0.75]),
        ("cosine", [1, 2, 3, 2.25, 1.5, 0.75, 0.75]),
    ],
)
def test_schedules_by_hand(schedule: Any, expected: list[float]) -> None:
    """lr 3, two updates of warm-up; then p = 0, 1/3, 2/3, 1, and beyond."""
    section = OptimizerSection(lr=3, schedule=schedule, warmup_updates=2, min_lr_frac=0.25)
    # At p = 1/3 and 2/3 the cosine stands at 3/4 and 1/4, the line at 2/3 and 1/3.
    if schedule == "cosine":
        expected = [1, 2, 3, 0.75 + 2.25 * 0.75, 0.75 + 2.25 * 0.25, 0.75, 0.75]
    rates = [learning_rate(update, 5, section) for update in range(7)]
    assert rates == pytest.approx(expected)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 30),
    total=st.integers(1, 60),
    floor=st.floats(0, 1),
)
def test_no_update_of_the_run_is_wasted(
    schedule: Any, warmup: int, total: int, floor: float
) -> None:
    """Each has a rate above 0 and at most lr; it rises in the warm-up only."""
    section = OptimizerSection(lr=0.5, schedule=schedule, warmup_updates=warmup, min_lr_frac=floor)
    rates = [learning_rate(update, total, section) for update in range(total)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert sorted(rates[warmup:], reverse=True) == rates[warmup:]
    assert sorted(rates[:warmup]) == rates[:warmup]
