"""What a loss is told, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LossName = Literal["clip", "gspo", "cispo", "sapo", "dppo_tv", "reinforce"]
Aggregation = Literal["token", "sequence", "constant", "prompt"]
Correction = Literal["none", "tis", "icepop"]

_KNOWN = {
    "loss": ("clip", "gspo", "cispo", "sapo", "dppo_tv", "reinforce"),
    "kl_estimator": ("k2", "k3"),
    "aggregation": ("token", "sequence", "constant", "prompt"),
    "ratio_anchor": ("old", "sampler"),
    "correction": ("none", "tis", "icepop"),
    "correction_level": ("token", "sequence"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """What is minimised; the names are those of the configuration's ``loss`` section.

    ``max_completion_length`` (tokens) is the denominator of the ``constant`` aggregation.

    Raises:
        ValueError: an unknown name; the estimator k1, which teaches nothing as a loss; or a
            correction beside a ratio to the sampler (``ratio_anchor: sampler``, or dppo_tv), which
            holds the gap already.
    """

    loss: LossName = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    delta: float | None = None
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    dppo_tv: float = 0.2
    beta: float = 0.0
    kl_estimator: Literal["k2", "k3"] = "k3"
    kl_unbiased: bool = False
    aggregation: Aggregation = "token"
    max_completion_length: int | None = None
    ratio_anchor: Literal["old", "sampler"] = "old"
    correction: Correction = "none"
    correction_level: Literal["token", "sequence"] = "token"
    correction_min: float = 0.5
    correction_max: float = 2.0
    off_policy_threshold: float | None = None
    top_entropy_frac: float = 1.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        estimator: str = self.kl_estimator
        if estimator == "k1":
            raise ValueError("k1 in the loss has a gradient of zero on average; use k2 or k3")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {known}")
        if self.anchored_at_sampler and self.correction != "none":
            raise ValueError("a ratio to the sampler holds the gap that a correction is for")
        if not 0 < self.top_entropy_frac <= 1:
            raise ValueError("top_entropy_frac must lie above 0, up to 1")

    @property
    def anchored_at_sampler(self) -> bool:
        """Whether the ratio is to the sampler, so that no old logprobs are needed."""
        return self.ratio_anchor == "sampler" or self.loss == "dppo_tv"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Per-token inputs [B, T]; advantages and loss_weights are [B, T], or [S] by sequence id.

    Attributes:
        logprobs: of the policy in training, with gradient; nats.
        old_logprobs: of the policy before the update; None where that is ``logprobs`` itself (the
            only update of its batch), or where the ratio is to the sampler.
        sampler_logprobs: of the distribution the tokens were drawn from; None where nothing needs
            them, and then their statistics are left out.
        ref_logprobs: of the reference policy; None when beta is 0.
        entropies: of the policy, with gradient where there is an entropy bonus; None leaves out
            their statistics.
        loss_mask: True on trained tokens.
        advantages: the advantage of a token's sequence.
        sequence_ids: [B, T] int, the sequence (completion) of each token; -1 for none.
        loss_weights: the weight of each token's loss, denominator included. None computes it from
            this batch alone, taken as the whole update.
        policy_mask: True on tokens that carry the policy loss when ``top_entropy_frac`` is below 1.
            None computes it from this batch alone, taken as the whole update.
    """

    logprobs: Tensor
    old_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropies: Tensor | None
    loss_mask: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    loss_weights: Tensor | None
    policy_mask: Tensor | None = None
