"""What losses need of the learner: old logprobs, top entropies, bonus, moving reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raygrpo.algorithm.step_plan import loss_config
from raygrpo.learner.first_pass import first_pass
from raygrpo.learner.inputs import policy_inputs
from raygrpo.learner.moving_reference import MovingReference
from raygrpo.types import Microbatch
from tests.close import as_vector, relative
from tests.parity.learner_cases import (
    filler,
    make_config,
    make_steps,
    microbatch,
    random_trees,
    separate,
)
from tests.parity.reference_learner import ReferenceLearner, weights_vector

CPU = torch.device("cpu")
# fp32 sums in another order, through AdamW (test_learner.py has the same).
RELATIVE = 1e-5


def reference(learner: ReferenceLearner) -> Tensor:
    assert learner.reference is not None
    return as_vector(learner.reference.model.parameters())


def count_forwards(learner: ReferenceLearner) -> list[bool]:
    """One entry a forward pass of the policy from now on: whether it kept a graph."""
    calls: list[bool] = []
    learner.policy.register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled()), always_call=True
    )
    return calls


@pytest.mark.parametrize(
    ("loss", "minibatches", "iterations", "extra"),
    [
        # One update: l_old is l itself. One minibatch: its first pass gives it.
        ({}, 1, 1, 0),
        ({}, 1, 3, 0),
        ({}, 2, 1, 4),
        ({}, 2, 2, 4),
        # Against the sampler no old forward is needed.
        ({"loss": "cispo", "ratio_anchor": "sampler"}, 2, 2, 0),
        ({"loss": "dppo_tv"}, 2, 1, 0),
        # The mask of top entropies needs a first pass; it is the same one.
        ({"top_entropy_frac": 0.5}, 1, 2, 2),
        ({"top_entropy_frac": 0.5}, 2, 2, 4),
        ({"loss": "dppo_tv", "top_entropy_frac": 0.5}, 2, 1, 4),
    ],
    ids=str,
)
def test_a_first_pass_is_made_only_where_it_is_needed(
    loss: dict[str, Any], minibatches: int, iterations: int, extra: int, model: Path
) -> None:
    train = {"num_minibatches": minibatches, "num_iterations": iterations}
    learner = ReferenceLearner(make_config(model, loss=loss, train=train))
    calls = count_forwards(learner)
    step = [[microbatch(random_trees(10 * i + k, 1)) for k in range(2)] for i in range(minibatches)]
    learner.update(step)
    assert calls.count(False) == extra
    assert calls.count(True) == 2 * minibatches * iterations


def test_one_threshold_for_all_minibatches(model: Path) -> None:
    """The tokens of the step's top entropies, however minibatches share them."""
    learner = ReferenceLearner(
        make_config(model, loss={"top_entropy_frac": 0.3}, train={"num_minibatches": 2})
    )
    inputs = [[policy_inputs(microbatch(random_trees(seed, 2)), CPU)] for seed in (1, 2)]
    held = first_pass(inputs, learner.policy, lambda value: value, loss_config(learner.config))
    with torch.no_grad():
        entropies = [learner.policy(batch[0])[1][batch[0].loss_mask] for batch in inputs]
    everything = torch.cat(entropies)
    count = int(0.3 * (len(everything) - 1)) + 1
    lowest = everything.sort(descending=True).values[count - 1]
    kept = []
    for batch, (item,), found in zip(inputs, held, entropies, strict=True):
        assert item.policy_mask is not None and item.old_logprobs is not None
        # A relative 1e-5 apart is a tie (the first tokens of completions of one prompt).
        assert torch.equal(item.policy_mask[batch[0].loss_mask], found >= lowest * (1 - 1e-5))
        kept.append(float(item.policy_mask.sum()) / len(found))
    assert abs(kept[0] - kept[1]) > 0.05, "minibatches alike would prove nothing"


EVERYTHING: dict[str, Any] = {
    "loss": "gspo",
    "clip_low": 0.01,
    "clip_high": 0.01,
    "beta": 0.1,
    "kl_unbiased": True,
    "top_entropy_frac": 0.4,
    "entropy_coef": 0.02,
    "off_policy_threshold": 0.1,
}


@pytest.mark.parametrize(
    "loss",
    [
        EVERYTHING,
        {"loss": "clip", "correction": "tis", "correction_level": "sequence"},
        {"loss": "cispo", "ratio_anchor": "sampler", "top_entropy_frac": 0.3},
        {"loss": "sapo", "entropy_coef": 0.05},
        {"loss": "dppo_tv", "dppo_tv": 0.01, "beta": 0.1, "kl_estimator": "k2"},
    ],
    ids=lambda loss: str(loss["loss"]),
)
def test_rows_and_microbatches_do_not_matter(loss: dict[str, Any], model: Path) -> None:
    """Law 1 through the model: shared prompts at once; plain rows one by one in another order."""
    config = make_config(model, loss=loss, train={"num_minibatches": 2, "num_iterations": 2})
    learners = [ReferenceLearner(config) for _ in range(2)]
    for step in range(2):
        trees = [random_trees(7 * step + i, 3) for i in range(2)]
        learners[0].update([[microbatch(t)] for t in trees])
        learners[1].update(
            [[*(microbatch([row]) for row in reversed(separate(t))), filler()] for t in trees]
        )
    assert relative(*map(weights_vector, learners)) < RELATIVE


def mean_entropy(learner: ReferenceLearner, batch: Microbatch) -> float:
    with torch.no_grad():
        _, entropies = learner.policy(policy_inputs(batch, CPU))
    return float(entropies[torch.tensor(batch.loss_mask)].mean())


@pytest.mark.parametrize("coef", [0.0, 1.0])
def test_the_bonus_raises_entropy(coef: float, model: Path) -> None:
    """With all advantages 0 nothing else acts."""
    batch = microbatch(random_trees(1, 4))
    batch.advantages[:] = 0
    learner = ReferenceLearner(
        make_config(model, loss={"entropy_coef": coef}, optimizer={"adamw": {"weight_decay": 0.0}})
    )
    before = mean_entropy(learner, batch)
    for _ in range(4):
        learner.update([[batch]])
    change = mean_entropy(learner, batch) - before
    assert change == 0 if coef == 0 else change > 1e-4


def test_the_coefficient_follows_the_entropy(model: Path) -> None:
    """Nothing in the first update, then a step more each, while the target is out of reach."""
    config = make_config(model, loss={"entropy_coef": 0.01, "entropy_target": 9.0})
    learner = ReferenceLearner(config)
    seen = [learner.update(step[0])["entropy_coef"].mean for step in make_steps(3, 1, 1)]
    assert seen == pytest.approx([0.0, 0.015, 0.02])
    low = ReferenceLearner(make_config(model, loss={"entropy_coef": 0.01, "entropy_target": 1e-6}))
    seen = [low.update(step[0])["entropy_coef"].mean for step in make_steps(3, 1, 1)]
    assert seen == [0.0] * 3


def test_a_constant_coefficient_is_the_configurations(model: Path, tmp_path: Path) -> None:
    """Also after a checkpoint of a run that had another."""
    saved, learner = (
        ReferenceLearner(make_config(model, loss={"entropy_coef": coef})) for coef in (0.1, 0.2)
    )
    saved.save(tmp_path)
    learner.load(tmp_path)
    assert learner.update(make_steps(1, 1, 1)[0][0])["entropy_coef"].mean == 0.2


def test_the_reference_moves_every_few_steps(model: Path) -> None:
    """Against the average written out, step by step; the KL is then to the moved reference."""
    config = make_config(
        model,
        loss={"beta": 0.1},
        learner={"reference": {"sync_steps": 2, "sync_alpha": 0.25}},
        train={"num_iterations": 2},
    )
    learner = ReferenceLearner(config)
    expected = reference(learner).clone()
    for number, step in enumerate(make_steps(4, 1, 1), start=1):
        learner.update(step[0])
        if number % 2 == 0:
            expected = 0.25 * weights_vector(learner) + 0.75 * expected
        torch.testing.assert_close(reference(learner), expected, atol=1e-7, rtol=1e-6)
    still = ReferenceLearner(make_config(model, loss={"beta": 0.1}, train={"num_iterations": 2}))
    start = reference(still).clone()
    stats = [still.update(step[0]) for step in make_steps(4, 1, 1)]
    assert torch.equal(reference(still), start)
    moved = learner.update(make_steps(5, 1, 1)[4][0])
    assert moved["kl"].mean < still.update(make_steps(5, 1, 1)[4][0])["kl"].mean
    assert stats[0]["kl"].mean >= 0


def test_a_reference_in_bfloat16_moves_by_less_than_its_rounding() -> None:
    """A tenth of bfloat16's spacing at 1 a step: averaged in bfloat16 it would stay at 1."""
    model = torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    model.weight.data.fill_(1)
    policy = torch.full((2, 3), 1 + 2**-7, dtype=torch.bfloat16)
    moving, expected, seen = MovingReference(model), 1.0, []
    for step in range(20):
        moving.move([("weight", policy), ("of_the_policy_alone", policy)], 0.1)
        expected = 0.1 * float(policy[0, 0]) + 0.9 * expected
        assert torch.equal(model.weight.data, torch.full_like(policy, expected))
        seen.append(float(model.weight.data[0, 0]))
        if step == 9:
            state, model = moving.state(), copy.deepcopy(model)
            moving = MovingReference(model)
            moving.load(state)
    assert (seen[0], seen[-1]) == (1, 1 + 2**-7)


def test_resume_is_bit_exact(model: Path, tmp_path: Path) -> None:
    """With what the loss remembers, and random states."""
    config = make_config(
        model,
        loss={"beta": 0.1, "entropy_coef": 0.01, "entropy_target": 9.0},
        learner={"reference": {"sync_steps": 1, "sync_alpha": 0.5}},
    )
    steps = make_steps(4, 1, 1)
    first, second = ReferenceLearner(config), ReferenceLearner(config)
    for index, step in enumerate(steps):
        stats = first.update(step[0])
        if index == 1:
            first.save(tmp_path)
            expected = torch.rand(2)
    second.update(steps[3][0])
    second.load(tmp_path)
    assert torch.equal(torch.rand(2), expected)
    for step in steps[2:]:
        again = second.update(step[0])
    assert torch.equal(weights_vector(first), weights_vector(second))
    assert torch.equal(reference(first), reference(second))
    assert again["entropy_coef"] == stats["entropy_coef"]
    assert second.num_updates == 4
