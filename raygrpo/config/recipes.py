"""Recipes: published algorithms as overrides of the one configuration. Data, not code.

docs/algorithms.md has a row for each. "clip 0.2" of a paper is 0.2 on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_NO_REFILL = {"dynamic_sampling": False}

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Dr.GRPO's unscaled advantage, DAPO's asymmetric clip, token mean and refill; token TIS
        # where generation may be stale.
        "default": {},
        # DeepSeekMath, 2402.03300: GRPO as first published, one update per batch.
        "deepseekmath": {
            "advantage": {"baseline": "mean", "scale": "group"},
            "loss": {
                "clip_low": 0.2,
                "clip_high": 0.2,
                "aggregation": "sequence",
                "beta": 0.04,
                "kl_estimator": "k3",
            },
            "train": {**_NO_REFILL, "num_iterations": 1, "num_minibatches": 1},
        },
        # What TRL 0.24's GRPOTrainer does when nothing is set.
        "trl024": {
            "data": {"max_prompt_length": 512, "overlong": "truncate_left"},
            "sampling": {"num_completions": 8, "max_tokens": 256, "temperature": 1.0},
            "advantage": {"baseline": "mean", "scale": "group"},
            "loss": {
                "clip_low": 0.2,
                "clip_high": 0.2,
                "aggregation": "token",
                "beta": 0.0,
                "correction": "none",
            },
            "train": _NO_REFILL,
            "optimizer": {"lr": 1e-6, "schedule": "linear", "max_grad_norm": 1.0},
        },
        # DAPO, 2503.14476: clip-higher, token mean, refill, soft overlong penalty, no KL.
        "dapo": {
            "advantage": {"baseline": "mean", "scale": "group", "overlong_buffer": 0.2},
            "loss": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "beta": 0.0},
            "train": {"dynamic_sampling": True},
        },
        # Dr.GRPO, 2503.20783: no length or difficulty bias.
        "dr_grpo": {
            "advantage": {"baseline": "mean", "scale": "none"},
            "loss": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "constant"},
            "train": _NO_REFILL,
        },
        # GSPO, 2507.18071: one ratio a sequence; acts with several minibatches, or stale samples.
        "gspo": {
            "advantage": {"baseline": "mean", "scale": "group"},
            "loss": {
                "loss": "gspo",
                "clip_low": 3e-4,
                "clip_high": 4e-4,
                "aggregation": "sequence",
            },
            "train": _NO_REFILL,
        },
        # ScaleRL, 2510.13786: CISPO against the sampler, eight versions of staleness.
        "scalerl": {
            "model": {"fp32_head": True},
            "data": {"max_pass_rate": 0.9},
            "advantage": {"baseline": "mean", "scale": "batch_centred"},
            "loss": {
                "loss": "cispo",
                "cispo_cap": 5.0,
                "ratio_anchor": "sampler",
                "aggregation": "prompt",
            },
            "train": {"dynamic_sampling": True, "max_staleness": 8},
        },
        # DPPO, 2602.04879: a trust region of probabilities instead of ratios, against the sampler.
        "dppo": {
            "advantage": {"baseline": "mean", "scale": "none"},
            "loss": {
                "loss": "dppo_tv",
                "dppo_tv": 0.2,
                "ratio_anchor": "sampler",
                "aggregation": "token",
            },
            "train": _NO_REFILL,
        },
        # RLOO, 2402.14740: each completion against the mean of the others.
        "rloo": {
            "advantage": {"baseline": "leave_one_out", "scale": "none"},
            "loss": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence"},
            "train": _NO_REFILL,
        },
    }
)
