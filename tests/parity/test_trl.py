"""Recipe ``trl024`` learns from given rollouts what TRL learns from them.

Two references: TRL 0.24.0 itself, whose results `record_trl024.py` recorded; and the installed
TRL 1.16, whose whole trainer runs here.

What changed in TRL between 0.24 and 1.16, and why the comparison stands:

- A completion has at most 512 tokens in 1.16, 256 in 0.24. The loss ``dapo`` does not know the
  limit, and the rollouts are shorter than both.
- 1.16 has no ``max_prompt_length``; 0.24 keeps a prompt's last 512 tokens. The rollouts' prompts
  are shorter; how the recipe cuts is tested in tests/data/test_data.py.
- 1.16 forms logprobs tile by tile of the head, 0.24 formed the logits: rounding alone differs.
- 1.16 rescales the loss where generation spans several updates; at the defaults it spans one.
- 1.16 leaves a completion whose every reward is None out of the baseline, 0.24 takes its reward
  for 0. raygrpo does as 1.16, and leaves it out of the denominator besides. Here all have one.
- Both correct for the sampler with vLLM only, and there differently; no vLLM here.
- 1.16 multiplies the KL by the ratio, 0.24 does not: beta is 0 in both.

Both compute advantages in fp32, raygrpo in float64. In a group whose rewards are all 0.7, whose
mean fp32 rounds, TRL's advantages are 6e-4 instead of 0; equal rewards here have an exact mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.close import relative
from tests.parity.trl_cases import (
    GROUP_SIZE,
    GROUPS_PER_STEP,
    KINDS,
    NUM_STEPS,
    TRL_SETTINGS,
    RecordingLearner,
    Rollout,
    Update,
    flat,
    make_noise,
    make_rollouts,
    save_model,
    train,
    trl024_config,
)

pytestmark = [
    # What transformers says of TRL's use of it, and TRL of its own rollout_func.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]

# fp32 sums in another order: prompts padded on the left, one row a completion, tiles of the head.
# Measured: 1.4e-6 of the loss, 1.8e-6 of the gradient's length.
TOLERANCE = 1e-5
ADVANTAGE_TOLERANCE = 1e-6
# Adam divides by the gradient's own size: an element whose gradient is near zero moves by a share
# of the rate that rounding decides. Of 30,000 elements one such makes 8e-4 of the movement's
# length; at a rate of 1e-4 that is 3e-7 of the weights.
WEIGHT_TOLERANCE, MOVEMENT_TOLERANCE = 1e-6, 3e-3
FAST = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in KINDS}


@dataclass(kw_only=True)
class Reference:
    """What another trainer did: advantages [step][sequence], and its updates."""

    advantages: list[list[float]] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)


def trl(
    path: Path,
    steps: Sequence[Sequence[Rollout]],
    output: Path,
    *,
    num_iterations: int = 1,
    accumulation: int = 1,
    lr: float = 1e-6,
    noise: dict[tuple[int, int], Any] | None = None,
) -> Reference:
    """TRL's `GRPOTrainer.train` on the rollouts, at its defaults but for what has to be said."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    found = Reference()
    rollouts = [rollout for step in steps for rollout in step]
    rows = GROUPS_PER_STEP * GROUP_SIZE

    def replay(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """What was generated for the prompts, whose text is their rollout's number."""
        chosen = [(rollouts[int(p)], i % GROUP_SIZE) for i, p in enumerate(prompts)]
        return {
            "prompt_ids": [rollout.prompt for rollout, _ in chosen],
            "completion_ids": [rollout.completions[i] for rollout, i in chosen],
            "logprobs": None,  # type: ignore[dict-item]
            "env_mask": [[int(m) for m in rollout.masks[i]] for rollout, i in chosen],
            "given": [rollout.rewards[i] for rollout, i in chosen],
        }

    class Recorder(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            numbers = [int(row["prompt"]) for row in inputs]
            found.advantages.append(output["advantages"].tolist())
            if noise is not None:
                shape = output["completion_ids"].shape
                added = torch.zeros(shape)
                for row, number in enumerate(numbers):
                    values = torch.from_numpy(noise[number, row % GROUP_SIZE])
                    added[row, : len(values)] = values
                pair = [output[f"{part}_ids"] for part in ("prompt", "completion")]
                masks = [output[f"{part}_mask"] for part in ("prompt", "completion")]
                with torch.no_grad():
                    logprobs, *_ = self._get_per_token_logps_and_entropies(
                        self.model, torch.cat(pair, 1), torch.cat(masks, 1), shape[1]
                    )
                output["old_per_token_logps"] = logprobs + added
            return output

        def training_step(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().training_step(*arguments, **keywords)
            self.losses = [*getattr(self, "losses", []), float(loss)]
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            named = model.named_parameters()
            self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}
            return super()._clip_grad_norm(model)

        def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
            super().log(logs, *arguments, **keywords)
            if "grad_norm" not in logs:
                return
            found.logs.append({**logs, **self.state.log_history[-1]})
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            found.updates.append(
                Update(
                    loss=sum(self.losses),
                    lr=logs["learning_rate"],
                    gradient=self.gradient,
                    weights=weights,
                )
            )
            self.losses = []

    config = GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=rows // accumulation,
        gradient_accumulation_steps=accumulation,
        num_iterations=num_iterations,
        max_steps=NUM_STEPS * num_iterations,
        learning_rate=lr,
        shuffle_dataset=False,
        **TRL_SETTINGS,
    )
    trainer = Recorder(
        model=str(path),
        reward_funcs=lambda given, **_: given,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(rollouts))]}),
        rollout_func=replay,
    )
    trainer.train()
    return found


def assert_same_updates(ours: RecordingLearner, theirs: Reference, path: Path) -> None:
    """Loss, rate, gradient and weights of every update."""
    start = flat(dict(RecordingLearner(trl024_config(path)).named_weights()))
    assert len(ours.updates) == len(theirs.updates)
    for mine, other in zip(ours.updates, theirs.updates, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=TOLERANCE)
        assert mine.lr == pytest.approx(other.lr)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=TOLERANCE)
        assert relative(flat(mine.gradient), flat(other.gradient)) < TOLERANCE
        assert relative(flat(mine.weights), flat(other.weights)) < WEIGHT_TOLERANCE
        if mine.lr > 1e-6:
            moved = flat(mine.weights) - start, flat(other.weights) - start
            assert relative(*moved) < MOVEMENT_TOLERANCE


def assert_same_advantages(ours: list[list[float]], theirs: list[list[float]]) -> None:
    assert [len(step) for step in ours] == [GROUPS_PER_STEP * GROUP_SIZE] * NUM_STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=ADVANTAGE_TOLERANCE)
    assert max(map(abs, ours[0])) > 0.8, "a group with signal"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"lr": 1e-6}, id="as it is"),
        pytest.param({"lr": FAST}, id="a rate that moves"),
        pytest.param({"lr": 10 * FAST, "num_iterations": 2}, id="two iterations"),
        pytest.param({"lr": FAST, "accumulation": 3}, id="accumulated"),
        pytest.param({"lr": FAST, "noise": 0.3}, id="perturbed old logprobs"),
        pytest.param({"lr": FAST, "holes": True}, id="masked tokens"),
    ],
)
def test_trl_1_16_does_the_same(
    kind: str, case: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    """Two steps of both trainers, from the same weights and rollouts."""
    steps = make_rollouts(holes=case.get("holes", False))
    noise = make_noise(steps, case["noise"]) if "noise" in case else None
    num_iterations = case.get("num_iterations", 1)
    theirs = trl(
        models[kind],
        steps,
        tmp_path,
        num_iterations=num_iterations,
        accumulation=case.get("accumulation", 1),
        lr=case["lr"],
        noise=noise,
    )
    # Several microbatches, some of them of rows that share a prompt.
    sections = {"num_iterations": num_iterations, "tokens_per_microbatch": 128}
    config = trl024_config(models[kind], optimizer={"lr": case["lr"]}, train=sections)
    advantages, ours = train(config, steps, noise)
    assert_same_advantages(advantages, theirs.advantages)
    assert_same_updates(ours, theirs, models[kind])
    # TRL averages over its microbatches, whatever their tokens.
    if case.get("accumulation", 1) == 1:
        for stats, logs in zip(ours.statistics, theirs.logs, strict=True):
            for name in ("clip_ratio/region_mean", "clip_ratio/low_mean", "entropy"):
                assert stats[name].mean == pytest.approx(logs[name], rel=1e-4), name
    clipped = sum(stats["clip_ratio/region_mean"].sum for stats in ours.statistics)
    assert (clipped > 10) == ("noise" in case or num_iterations > 1), "the clip acts where it can"


RECORDED = json.loads((Path(__file__).parent / "trl024.json").read_text())["runs"]


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: f"{run['name']}-{run['kind']}")
def test_trl_0_24_did_the_same(run: dict[str, Any], models: dict[str, Path]) -> None:
    """Vectors by their length and their products with random directions."""
    steps = make_rollouts()
    config = trl024_config(
        models[run["kind"]],
        optimizer={"lr": run["lr"]},
        train={"num_iterations": run.get("num_iterations", 1)},
    )
    start = flat(dict(RecordingLearner(config).named_weights()))
    assert_projections(start, run["start"], 1e-9)  # else the recording is of other weights
    noise = make_noise(steps, 0.3) if run.get("noise") else None
    advantages, ours = train(config, steps, noise)
    assert_same_advantages(advantages, run["advantages"])
    for mine, recorded in zip(ours.updates, run["updates"], strict=True):
        assert mine.loss == pytest.approx(recorded["loss"], rel=TOLERANCE)
        assert mine.lr == pytest.approx(recorded["lr"])
        assert_projections(flat(mine.gradient), recorded["gradient"], TOLERANCE)
        assert_projections(flat(mine.weights) - start, recorded["movement"], MOVEMENT_TOLERANCE)


def assert_projections(vector: Tensor, recorded: Sequence[float], tolerance: float) -> None:
    """A difference of relative length d has products of standard deviation d times the length."""
    length, *products = recorded
    assert float(vector.norm()) == pytest.approx(length, rel=tolerance)
    random = np.random.RandomState(11)
    found = [float(vector.numpy() @ random.standard_normal(len(vector))) for _ in products]
    assert found == pytest.approx(products, rel=0, abs=4 * tolerance * length)


def test_the_recipe_has_trls_settings(tmp_path: Path) -> None:
    """Against TRL 1.16's defaults; the two that changed since 0.24 by 0.24's numbers."""
    from trl import GRPOConfig

    theirs = GRPOConfig(output_dir=str(tmp_path), **TRL_SETTINGS)
    ours = trl024_config(Path("unused"), sampling={"max_tokens": 256})
    section = ours.optimizer
    assert section.lr == theirs.learning_rate == 1e-6
    assert (section.schedule, section.warmup_updates) == ("linear", 0)
    assert (str(theirs.lr_scheduler_type.value), theirs.warmup_steps) == ("linear", 0)
    assert section.adamw.betas == (theirs.adam_beta1, theirs.adam_beta2) == (0.9, 0.999)
    assert section.adamw.weight_decay == theirs.weight_decay == 0
    assert section.max_grad_norm == theirs.max_grad_norm == 1.0
    assert "adamw" in str(theirs.optim.value) and theirs.adam_epsilon == 1e-8
    assert torch.optim.AdamW([torch.zeros(1)]).defaults["eps"] == theirs.adam_epsilon
    assert ours.sampling.num_completions == theirs.num_generations == 8
    drawn = ours.sampling.settings()
    assert (drawn.temperature, drawn.top_p) == (theirs.temperature, theirs.top_p)
    assert (drawn.top_k, drawn.repetition_penalty) == (0, theirs.repetition_penalty)
    assert theirs.loss_type == "dapo" and ours.loss.aggregation == "token"
    assert theirs.scale_rewards == "group" == ours.advantage.scale
    assert ours.loss.beta == theirs.beta == 0
    assert ours.loss.clip_low == ours.loss.clip_high == theirs.epsilon == 0.2
    assert theirs.epsilon_high is None and ours.loss.correction == "none"
    assert ours.train.num_iterations == theirs.num_iterations == 1
    assert not ours.advantage.mask_truncated and not theirs.mask_truncated_completions
    defaults = trl024_config(Path("unused"), sampling={"max_tokens": 256}).data
    assert (defaults.max_prompt_length, defaults.overlong) == (512, "truncate_left")
