"""The sections that say what is learned; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from raygrpo.config.base import Section, key

Correction = Literal["none", "tis", "icepop"]


class AdvantageSection(Section):
    """From rewards to advantages."""

    baseline: Literal["mean", "leave_one_out", "max_rl"] = key(
        "mean", "What is taken off a reward."
    )
    scale: Literal["none", "group", "group_population", "batch", "batch_centred", "gdpo"] = key(
        "none",
        "What the difference is divided by. gdpo: each reward is normalised in its group before "
        "they are summed, and the sum in the step; otherwise rewards are summed first.",
    )
    overlong_buffer: float = key(
        0.0,
        "Soft overlong penalty: rewards fall by up to 1 over this last share of "
        "sampling.max_tokens; 0: none.",
        ge=0,
        le=1,
    )
    mask_truncated: bool | Literal["exclude"] = key(
        False,
        "Overlong filter: truncated completions count in the baseline, not in the loss; exclude: "
        "in neither, nor in the scale.",
    )

    @model_validator(mode="after")
    def _one_normalisation(self) -> AdvantageSection:
        if self.scale == "gdpo" and self.baseline != "mean":
            raise ValueError("scale: gdpo takes off means: set advantage.baseline: mean")
        if self.scale == "gdpo" and self.overlong_buffer:
            raise ValueError("overlong_buffer with scale: gdpo: add the reward `length` instead")
        return self


class LossSection(Section):
    """What is minimised."""

    loss: Literal["clip", "gspo", "cispo", "sapo", "dppo_tv", "reinforce"] = key(
        "clip", "Policy loss."
    )
    clip_low: float = key(0.2, "Lower clip range of the ratio (clip, gspo).", ge=0, lt=1)
    clip_high: float = key(0.28, "Upper clip range of the ratio (clip, gspo).", ge=0)
    delta: float | None = key(None, "Upper bound of the ratio in the unclipped term.", gt=1)
    dual_clip: float | None = key(None, "Bound c of the loss of negative advantages.", gt=1)
    cispo_cap: float = key(5.0, "Cap of cispo's ratio, the number itself.", gt=0)
    sapo_tau_pos: float = key(1.0, "Temperature of sapo, positive advantages.", gt=0)
    sapo_tau_neg: float = key(1.05, "Temperature of sapo, other advantages.", gt=0)
    dppo_tv: float = key(0.2, "dppo_tv drops tokens whose probability moved further.", gt=0, le=1)
    beta: float = key(0.0, "Weight of the KL to the reference; 0 loads no reference.", ge=0)
    kl_estimator: Literal["k2", "k3"] = key("k3", "Estimator of that KL.")
    kl_unbiased: bool = key(False, "Multiply the KL by the ratio.")
    aggregation: Literal["token", "sequence", "constant", "prompt"] = key(
        "token", "Denominator of the loss, global over one optimizer update."
    )
    ratio_anchor: Literal["old", "sampler"] = key(
        "old", "What the ratio is to: the policy before the step, or the sampler's logprobs."
    )
    correction: Literal["auto", "none", "tis", "icepop"] = key(
        "auto",
        "Correction for the gap between sampler and learner; auto: tis where generation may be "
        "stale and the sampler's logprobs allow it.",
    )
    correction_level: Literal["token", "sequence"] = key("token", "Ratio by token or by sequence.")
    correction_min: float = key(0.5, "Lower end of icepop.", ge=0)
    correction_max: float = key(2.0, "Cap of tis; upper end of icepop.", gt=0)
    off_policy_threshold: float | None = key(
        None,
        "Drop sequences of negative advantage that the sampler found likelier by more, by token.",
        "nats",
    )
    top_entropy_frac: float = key(
        1.0, "Share of tokens, those of highest entropy, with a policy loss.", gt=0, le=1
    )
    entropy_coef: float = key(
        0.0, "Weight of the entropy bonus; adapted with entropy_target.", ge=0
    )
    entropy_target: float | None = key(
        None,
        "Entropy below which the bonus acts and its weight grows by 0.005 a step.",
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
                f"correction: {self.correction} corrects the gap between sampler and old policy, "
                "which a ratio to the sampler holds already: set correction: none"
            )
        if self.correction == "icepop" and self.correction_min > self.correction_max:
            raise ValueError("correction_min is larger than correction_max")
        if self.loss == "reinforce" and self.ratio_anchor == "sampler":
            raise ValueError("loss: reinforce has no ratio; set ratio_anchor: old, or loss: cispo")
        bounds = [name for name in ("delta", "dual_clip") if getattr(self, name) is not None]
        if bounds and self.loss not in ("clip", "gspo"):
            raise ValueError(f"{bounds[0]} acts with loss: clip and gspo only, not {self.loss}")
        return self

    @property
    def anchored_at_sampler(self) -> bool:
        """Whether the ratio is to the sampler, so that no old logprobs are needed."""
        return self.ratio_anchor == "sampler" or self.loss == "dppo_tv"

    @property
    def needs_sampler(self) -> bool:
        """Whether the loss reads the sampler's logprobs whatever the staleness."""
        corrects = self.correction in ("tis", "icepop")
        return corrects or self.anchored_at_sampler or self.off_policy_threshold is not None

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the gradient goes through entropies."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def acts_without_signal(self) -> bool:
        """Whether the loss has a gradient where all advantages are 0."""
        return self.beta > 0 or self.has_entropy_bonus or self.loss == "dppo_tv"

    def correction_for(self, *, stale: bool, renormalised: bool) -> Correction:
        """The correction that ``auto`` stands for.

        Args:
            stale: whether groups may be older than the weights they train.
            renormalised: whether the sampler's logprobs are of another distribution (top-p, ...).
        """
        if self.correction != "auto":
            return self.correction
        return "tis" if stale and not (renormalised or self.anchored_at_sampler) else "none"
