"""Every loss, correction and aggregation on two real ranks, against one process of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raygrpo.config import RunConfig
from raygrpo.learner.watch import PATIENCE
from raygrpo.types import merge_stats
from tests import oracle
from tests.algorithm.loss_cases import AGGREGATIONS, CORRECTIONS, LOSSES
from tests.close import relative_weights
from tests.parity.learner_cases import make_config, make_steps, planned_step, random_groups
from tests.parity.reference_learner import ReferenceLearner
from tests.parity.test_deepspeed import check, make_case, run_cases

pytestmark = pytest.mark.timeout(600)
STAGE, NUM_STEPS = 2, 2
# The model knows nothing of the sampler, whose logprobs are -3 on average: its ratios are far from
# 1, and these bounds have some on either side.
BOUNDS = {"correction_min": 0.05, "correction_max": 2.0}
TIGHT = {**LOSSES, "cispo": {"loss": "cispo", "cispo_cap": 1.02}}
LOSS_CASES: dict[str, dict[str, Any]] = {
    **TIGHT,
    **{
        f"{loss}, {name}": {**TIGHT[loss], **CORRECTIONS[name], **BOUNDS}
        for loss, name in zip(("clip", "gspo", "sapo", "cispo"), CORRECTIONS, strict=True)
    },
}
# The statistic that is not 0 where a bound of the loss acts.
BOUND = {
    "clip": "clip_ratio/region_mean",
    "gspo": "clip_ratio/region_mean",
    "dppo_tv": "clip_ratio/region_mean",
    "cispo": "cispo_clip_ratio",
}
STUCK = "model.layers.0.mlp.up_proj.weight"


def sections_of(name: str) -> dict[str, Any]:
    """Two minibatches a step, so that ratios are not 1; a loss without one is for one update."""
    section = LOSS_CASES[name]
    count = 1 if section.get("loss") == "reinforce" else 2
    return {"loss": section, "train": {"num_minibatches": count, "groups_per_step": 2}}


def planned_sections(aggregation: str) -> dict[str, Any]:
    return {
        "loss": {"loss": "reinforce", "aggregation": aggregation},
        "advantage": {"scale": "group", "mask_truncated": True},
        "train": {"groups_per_step": 5},
    }


@pytest.fixture(scope="module")
def ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases in one process group."""
    cases = {}
    for name in LOSS_CASES:
        cases[name] = make_case(model, STAGE, "train", **sections_of(name))
    for name in AGGREGATIONS:
        cases[name] = make_case(model, STAGE, "train_planned", **planned_sections(name))
    for case in cases.values():
        case["steps"] = NUM_STEPS
    for how, stage in (("frozen", 3), ("unreached", 2)):
        # Weight decay moves what gets no gradient: moving alone proves nothing.
        adamw = {"weight_decay": 0.1 if how == "unreached" else 0.0}
        steps = {"steps": 2 * PATIENCE}
        case = make_case(model, stage, "stuck", optimizer={"adamw": adamw}, train=steps)
        cases[how] = {**case, "how": how, "tensor": STUCK}
    return run_cases(tmp_path_factory.mktemp("losses") / "two", 2, cases)


@pytest.mark.parametrize("case", LOSS_CASES)
def test_every_loss_and_correction_on_two_ranks(
    case: str, ranks: list[dict[str, Any]], model: Path
) -> None:
    section = LOSS_CASES[case]
    learner = ReferenceLearner(make_config(model, **sections_of(case)))
    before = dict(learner.named_weights())
    steps = make_steps(NUM_STEPS, learner.config.train.num_minibatches, 1)
    history = [learner.update(step[0]) for step in steps]
    check(ranks, case, history, dict(learner.named_weights()))
    assert relative_weights(ranks[0][case]["after"], before) > 1e-3
    stats = merge_stats(history)
    if (bound := BOUND.get(section.get("loss", "clip"))) is not None:
        assert 0 < stats[bound].mean < 1
    if "correction" in section:
        used = stats["sampling/importance_sampling_ratio"]
        assert used.min < used.max <= BOUNDS["correction_max"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_planned_step_on_two_ranks(
    aggregation: str, ranks: list[dict[str, Any]], model: Path
) -> None:
    """From groups to weights: against plain rows in one process, and the first loss by hand."""
    learner = ReferenceLearner(make_config(model, **planned_sections(aggregation)))
    by_hand = oracle.loss(
        completions(learner),
        loss="reinforce",
        aggregation=aggregation,
        max_completion_length=learner.config.sampling.max_tokens,
    )
    history = []
    for seed in range(NUM_STEPS):
        (share,) = planned_step(learner.config, seed, 1, "plain")
        history.append(learner.update(share))
    assert ranks[0][aggregation]["layout"] == "packed"
    check(ranks, aggregation, history, dict(learner.named_weights()))
    for rank in ranks:
        assert rank[aggregation]["history"][0]["ratio"].count, "both ranks train"
    assert ranks[0][aggregation]["history"][0]["loss"].sum == pytest.approx(by_hand, rel=1e-5)


def completions(learner: ReferenceLearner) -> list[oracle.Sequence_]:
    """The first planned step's, as the oracle reads them, under the learner's weights.

    One without a score is in nothing, a truncated one counts as a sequence without tokens.
    """
    found = []
    for payload, done in random_groups(0, learner.config.train.groups_per_step):
        rewards = [score.value for score in done.scores]
        values = oracle.advantages(rewards, "mean", "group")
        prompt = payload.request.prompt.token_ids
        for index, member in enumerate(payload.completions):
            if rewards[index] is None:
                continue
            new = scores(learner.config, learner, prompt, member.token_ids)
            kept = member.loss_mask & (member.finish != "length")
            found.append(
                oracle.Sequence_(
                    new=new,
                    old=new,
                    sampler=member.logprobs.tolist(),
                    ref=new,
                    entropy=[0.0] * len(new),
                    mask=kept.tolist(),
                    advantage=values[index],
                    group=done.group_id,
                )
            )
    assert any(not one.length for one in found) and len({one.group for one in found}) > 1
    return found


def scores(config: RunConfig, learner: ReferenceLearner, prompt: Any, tokens: Any) -> list[float]:
    """A completion's logprobs from the model's own logits."""
    import torch

    ids = torch.tensor(np.concatenate([prompt, tokens]))[None].long()
    with torch.no_grad():
        logits = learner.hf_model(ids).logits[0, :-1] / config.sampling.temperature
    chosen = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return chosen[len(prompt) - 1 :].tolist()


@pytest.mark.parametrize(
    ("how", "what"), [("frozen", "have not moved"), ("unreached", "have had no gradient")]
)
def test_a_tensor_that_does_not_train_is_named_on_every_rank(
    how: str, what: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        report = rank[how]
        assert report["count"] == PATIENCE
        assert (
            f"NumericError: after {PATIENCE} optimizer updates 1 tensors {what}, "
            in report["raised"]
        )
        assert f"the first being {STUCK}" in report["raised"]
