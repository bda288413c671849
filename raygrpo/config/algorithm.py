"""The sections advantage and loss; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from raygrpo.config.base import Section, key

LossName = Literal["clip", "gspo", "cispo", "sapo", "dppo_tv", "reinforce"]
KlEstimator = Literal["k2", "k3"]
Anchor = Literal["old", "sampler"]
Correction = Literal["none", "tis", "icepop"]
Level = Literal["token", "sequence"]


class AdvantageSection(Section):
    """From rewards to advantages."""

    baseline: Literal["mean", "leave_one_out", "max_rl"] = key(
        "mean",
        "Number subtracted from a reward: the mean of its group, or of the group's other "
        "completions. max_rl: the mean of its group, which the difference is then divided by.",
    )
    scale: Literal["none", "group", "group_population", "batch", "batch_centred", "gdpo"] = key(
        "none",
        "Standard deviation that divides the difference: of the group (ddof 1; group_population: "
        "0), or of the step (batch_centred: of its differences). gdpo: rewards are normalised one "
        "by one in the group, then their sum in the step.",
    )
    overlong_buffer: float = key(
        0.0,
        "Soft overlong penalty: rewards fall by up to 1 over the last share of "
        "sampling.max_tokens; 0: no penalty.",
        ge=0,
        le=1,
    )
    mask_truncated: bool | Literal["exclude"] = key(
        False,
        "Overlong filter: truncated completions count in the baseline but not in the loss. "
        "exclude: they count in neither, nor in the scale.",
    )

    @model_validator(mode="after")
    def _one_normalisation(self) -> AdvantageSection:
        if self.scale == "gdpo" and self.baseline != "mean":
            raise ValueError("scale: gdpo subtracts means: set advantage.baseline: mean")
        if self.scale == "gdpo" and self.overlong_buffer:
            raise ValueError("overlong_buffer with scale: gdpo: add the reward `length` instead")
        return self


class LossSection(Section):
    """The objective that is minimised."""

    loss: LossName = key("clip", "Loss of the policy; docs/algorithms.md has the formulas.")
    clip_low: float = key(0.2, "Lower clip range of the ratio (clip, gspo).", ge=0, lt=1)
    clip_high: float = key(0.28, "Upper clip range of the ratio (clip, gspo).", ge=0)
    delta: float | None = key(
        None, "Upper bound of the ratio in the unclipped term (clip, gspo).", gt=1
    )
    dual_clip: float | None = key(
        None, "Bound c of the loss of negative advantages (clip, gspo).", gt=1
    )
    cispo_cap: float = key(5.0, "Cap of the ratio (cispo).", gt=0)
    sapo_tau_pos: float = key(1.0, "Temperature of positive advantages (sapo).", gt=0)
    sapo_tau_neg: float = key(1.05, "Temperature of all other advantages (sapo).", gt=0)
    dppo_tv: float = key(
        0.2, "Tokens whose probability moved further are dropped (dppo_tv).", gt=0, le=1
    )
    beta: float = key(0.0, "Weight of the KL to the reference policy; 0 loads no reference.", ge=0)
    kl_estimator: KlEstimator = key("k3", "Estimator of the KL.")
    kl_unbiased: bool = key(
        False, "Multiply the KL by the ratio, which makes its gradient unbiased."
    )
    aggregation: Literal["token", "sequence", "constant", "prompt"] = key(
        "token",
        "Mean of the loss over an optimizer update, on all ranks. token: over tokens. sequence: "
        "over the completions' token means. prompt: over the prompts' token means. constant: the "
        "sum over the number of completions times sampling.max_tokens.",
    )
    ratio_anchor: Anchor = key(
        "old",
        "Denominator of the ratio: the policy before the step (old), or the sampler's logprobs.",
    )
    correction: Literal["auto"] | Correction = key(
        "auto",
        "Correction for the gap between sampler and learner. auto: tis where generation may be "
        "stale and no filter changes the sampler's distribution, else none.",
    )
    correction_level: Level = key(
        "token", "Ratio of the correction: by token, or by sequence (geometric mean)."
    )
    correction_min: float = key(0.5, "Lower end of the range that icepop keeps.", ge=0)
    correction_max: float = key(2.0, "Cap of tis; upper end of the range that icepop keeps.", gt=0)
    off_policy_threshold: float | None = key(
        None,
        "Sequences of negative advantage are dropped whose logprobs are lower than the sampler's "
        "by more than this (mean over tokens).",
        "nats",
    )
    top_entropy_frac: float = key(
        1.0, "Share of tokens that have a policy loss: those of highest entropy.", gt=0, le=1
    )
    entropy_coef: float = key(
        0.0, "Weight of the entropy bonus; with entropy_target, its first value.", ge=0
    )
    entropy_target: float | None = key(
        None,
        "Entropy below which the bonus acts and its weight grows by 0.005 an update.",
        "nats",
        gt=0,
    )

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _no_k1(cls, value: Any) -> Any:
        if value == "k1":
            raise ValueError("k1 in the loss has a gradient of zero on average; use k2 or k3")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> LossSection:
        corrects = self.correction in ("tis", "icepop")
        if corrects and self.anchored_at_sampler:
            raise ValueError(
                f"correction: {self.correction} with a ratio to the sampler: the ratio holds "
                "already what the correction corrects; set correction: none"
            )
        if self.correction == "icepop" and self.correction_min > self.correction_max:
            raise ValueError("correction_min is larger than correction_max")
        if self.loss == "reinforce" and self.ratio_anchor == "sampler":
            raise ValueError("loss: reinforce has no ratio: set ratio_anchor: old, or loss: cispo")
        bounds = [name for name in ("delta", "dual_clip") if getattr(self, name) is not None]
        if bounds and self.loss not in ("clip", "gspo"):
            raise ValueError(f"{bounds[0]} acts with loss: clip and gspo only, not {self.loss}")
        return self

    @property
    def anchored_at_sampler(self) -> bool:
        """Whether the ratio is to the sampler's logprobs; old logprobs are not needed then."""
        return self.ratio_anchor == "sampler" or self.loss == "dppo_tv"

    @property
    def needs_sampler(self) -> bool:
        """Whether the loss reads the sampler's logprobs at any staleness."""
        corrects = self.correction in ("tis", "icepop")
        return corrects or self.anchored_at_sampler or self.off_policy_threshold is not None

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has a gradient through entropies."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def acts_without_signal(self) -> bool:
        """Whether the loss has a gradient although all advantages are 0."""
        return self.beta > 0 or self.has_entropy_bonus or self.loss == "dppo_tv"

    def correction_for(self, *, stale: bool, renormalised: bool) -> Correction:
        """The correction that ``auto`` stands for.

        Args:
            stale: whether groups may be older than the weights that they train.
            renormalised: whether filters (top-p, ...) change the sampler's distribution.
        """
        if self.correction != "auto":
            return self.correction
        return "tis" if stale and not (renormalised or self.anchored_at_sampler) else "none"
