"""The losses against TRL's own `_compute_loss`, on perturbed logprobs: value and gradient.

TRL's method runs unchanged on stored logprobs in place of a model's.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from raygrpo.algorithm.entropy import EntropyControl, entropy_threshold, top_entropy_mask
from raygrpo.algorithm.loss import (
    Aggregation,
    LossConfig,
    LossInputs,
    loss_weights_for,
    policy_loss,
)
from tests.close import relative

ROWS, LENGTH = 7, 9


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64)

    new = -torch.rand(ROWS, LENGTH, generator=generator, dtype=torch.float64) * 3
    lengths = torch.randint(1, LENGTH + 1, (ROWS,), generator=generator)
    return {
        "new": new,
        "old": new + noise(0.3),
        "sampler": new + noise(0.4),
        "ref": new + noise(0.5),
        "entropies": noise(1.0).abs(),
        "mask": (torch.arange(LENGTH)[None] < lengths[:, None]).long(),
        "advantages": torch.randn(ROWS, generator=generator, dtype=torch.float64),
    }


class Theirs:
    """What `_compute_loss` reads of a trainer, with TRL's defaults."""

    def __init__(self, data: dict[str, Tensor], **options: Any) -> None:
        self.data = data
        self.accelerator = Accelerator(cpu=True)
        self.args = SimpleNamespace(
            delta=None,
            use_bias_correction_kl=False,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        )
        self.model = SimpleNamespace(training=True)
        self._metrics: Any = {"train": defaultdict(list)}
        self.aux_loss_enabled = self.use_vllm = self._entropy_bonus_enabled = False
        self.vllm_importance_sampling_correction = True
        self.use_adaptive_entropy = False
        self.off_policy_mask_threshold = None
        self.top_entropy_quantile, self.beta = 1.0, 0.0
        self.importance_sampling_level, self.loss_type = "token", "dapo"
        self.epsilon_low, self.epsilon_high = 0.1, 0.15
        self.current_gradient_accumulation_steps = 1
        self.max_completion_length = 20
        for name, value in options.items():
            setattr(self.args if hasattr(self.args, name) else self, name, value)

    get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask
    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Any, Any, None]:
        return self.logprobs, self.data["entropies"], None

    def loss(self) -> tuple[float, Tensor]:
        self.logprobs = self.data["new"].clone().requires_grad_()
        ones = torch.ones(ROWS, 1, dtype=torch.long)
        rho = torch.exp(self.data["old"] - self.data["sampler"]).clamp(max=1.2)
        inputs = {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": torch.ones(ROWS, LENGTH, dtype=torch.long),
            "completion_mask": self.data["mask"],
            "advantages": self.data["advantages"],
            "old_per_token_logps": self.data["old"],
            "sampling_per_token_logps": self.data["sampler"],
            "ref_per_token_logps": self.data["ref"],
            "importance_sampling_ratio": rho,
            "num_items_in_batch": self.data["mask"].sum(),
        }
        value = GRPOTrainer._compute_loss(self, None, inputs)
        value.backward()
        assert self.logprobs.grad is not None
        return value.item(), self.logprobs.grad


def ours(
    data: dict[str, Tensor], aggregation: Aggregation = "token", **options: Any
) -> tuple[float, Tensor]:
    logprobs = data["new"].clone().requires_grad_()
    config = LossConfig(**{"clip_low": 0.1, "clip_high": 0.15, **options})
    mask = data["mask"].bool()
    bar = entropy_threshold(data["entropies"][mask], config.top_entropy_frac)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=data["old"],
        sampler_logprobs=data["sampler"],
        ref_logprobs=data["ref"],
        entropies=data["entropies"],
        loss_mask=mask,
        policy_mask=top_entropy_mask(data["entropies"], mask, bar),
        advantages=data["advantages"],
        sequence_ids=torch.arange(ROWS)[:, None].expand(ROWS, LENGTH),
        loss_weights=loss_weights_for(aggregation, mask.sum(1).tolist(), max_completion_length=20),
    )
    value, _ = policy_loss(inputs, config)
    value.backward()
    assert logprobs.grad is not None
    return value.item(), logprobs.grad


GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo"}


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ({"loss_type": "dapo"}, {}),
        ({"loss_type": "grpo"}, {"aggregation": "sequence"}),
        ({"loss_type": "dr_grpo"}, {"aggregation": "constant"}),
        ({"delta": 1.3}, {"delta": 1.3}),
        (GSPO, {"loss": "gspo", "aggregation": "sequence"}),
        ({"loss_type": "cispo", "epsilon_high": 1.2}, {"loss": "cispo", "cispo_cap": 1.2}),
        ({"loss_type": "sapo"}, {"loss": "sapo", "aggregation": "sequence"}),
        ({"beta": 0.2}, {"beta": 0.2}),
        ({"beta": 0.2, "use_bias_correction_kl": True}, {"beta": 0.2, "kl_unbiased": True}),
        ({"off_policy_mask_threshold": 0.05}, {"off_policy_threshold": 0.05}),
        ({"top_entropy_quantile": 0.3}, {"top_entropy_frac": 0.3}),
        ({"use_vllm": True}, {"correction": "tis", "correction_max": 1.2}),
    ],
    ids=str,
)
def test_value_and_gradient_are_trls(
    data: dict[str, Tensor], theirs: dict[str, Any], options: dict[str, Any]
) -> None:
    expected, gradient = Theirs(data, **theirs).loss()
    value, got = ours(data, **options)
    # Weights are float32 here: 1e-7 relative.
    assert value == pytest.approx(expected, rel=1e-6)
    assert relative(got, gradient) < 1e-6
    plain, _ = ours(data, aggregation=options.get("aggregation", "token"))
    assert value != plain or not set(options) - {"aggregation"}


@pytest.mark.parametrize("frac", [0.05, 0.2, 0.5, 0.83, 1.0])
def test_the_top_entropy_mask_is_trls(data: dict[str, Tensor], frac: float) -> None:
    mask = data["mask"].bool()
    entropies = data["entropies"].float()
    expected = Theirs(data).get_high_entropy_mask(entropies, mask, 1 - frac)
    bar = entropy_threshold(entropies[mask], frac)
    assert torch.equal(top_entropy_mask(entropies, mask, bar), expected)


def test_the_adaptive_coefficient_is_trls(data: dict[str, Tensor]) -> None:
    """Coefficient, gate and what is subtracted, over updates around the target."""
    theirs = Theirs(
        data,
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=True,
        entropy_coef=0.012,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
    )
    vars(theirs.args).update(
        entropy_target=1.0, entropy_coef_delta=0.005, entropy_coef_max=1.0, entropy_coef_min=0.0
    )
    control = EntropyControl(coef=0.012, target=1.0)
    mask = data["mask"].bool()
    for scale in (2.0, 0.5, 0.6, 3.0, 3.0, 3.0, 3.0, 0.4, 0.4):
        theirs.data = {**data, "entropies": data["entropies"] * scale}
        expected, _ = theirs.loss()
        value, _ = ours(theirs.data, entropy_coef=control.applied)
        assert value == pytest.approx(expected, rel=1e-6)
        control = control.after(float(theirs.data["entropies"][mask].mean()))
        assert control.coef == pytest.approx(theirs.entropy_coef, abs=1e-12)
    assert EntropyControl(coef=0.3).after(9.0).applied == 0.3, "constant without a target"
    top = EntropyControl(coef=0.999, target=1.0).after(0.1)
    assert top.coef == top.after(0.1).coef == 1.0
