"""Recipes: published algorithms as overrides of the one configuration. Data, not code."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_NO_REFILL = {"dynamic_sampling": False}

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Dr.GRPO's unscaled advantage, DAPO's asymmetric clip, token mean and refill.
        "default": {},
        # DeepSeekMath, 2402.03300: GRPO as first published.
        "deepseekmath": {
            "advantage": {"baseline": "mean", "scale": "group"},
            "loss": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence", "beta": 0.04},
            "train": _NO_REFILL,
        },
        # What TRL 0.24's GRPOTrainer does when nothing is set.
        "trl024": {
            "data": {"max_prompt_length": 512, "overlong": "truncate_left"},
            "sampling": {"num_completions": 8, "max_tokens": 256, "temperature": 1.0},
            "advantage": {"baseline": "mean", "scale": "group"},
            "loss": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token", "beta": 0.0},
            "train": _NO_REFILL,
            "optimizer": {"lr": 1e-6, "schedule": "linear", "max_grad_norm": 1.0},
        },
        # Dr.GRPO, 2503.20783: no length or difficulty bias.
        "dr_grpo": {
            "advantage": {"baseline": "mean", "scale": "none"},
            "loss": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "constant"},
            "train": _NO_REFILL,
        },
        # DAPO, 2503.14476: clip-higher, token mean, refill, no KL. The soft overlong penalty is the
        # `length` reward, added by the user, because its two lengths depend on the task.
        "dapo": {
            "advantage": {"baseline": "mean", "scale": "group"},
            "loss": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "beta": 0.0},
            "train": {"dynamic_sampling": True},
        },
    }
)
