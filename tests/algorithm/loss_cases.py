"""Random completions for loss tests, the ways to lay them out in rows, and every loss by name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from raygrpo.algorithm.loss import LossConfig, LossInputs, loss_weights_for
from tests.oracle import Sequence_

Layout = Literal["padded", "packed", "shared"]
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
AGGREGATIONS = ("token", "sequence", "constant", "prompt")
LMAX = 9
PROMPT = 2
GARBAGE = 7.7

# Every loss, with bounds tight enough to act on the perturbed logprobs of `make_sequences`.
LOSSES: dict[str, dict[str, Any]] = {
    "clip": {"clip_low": 0.1, "clip_high": 0.15},
    "clip delta": {"clip_high": 0.15, "delta": 1.3},
    "clip dual": {"clip_low": 0.1, "dual_clip": 1.2},
    "clip sampler": {"clip_low": 0.1, "clip_high": 0.15, "ratio_anchor": "sampler"},
    "gspo": {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.08},
    "gspo sampler": {"loss": "gspo", "clip_low": 0.1, "ratio_anchor": "sampler"},
    "cispo": {"loss": "cispo", "cispo_cap": 1.2},
    "cispo sampler": {"loss": "cispo", "cispo_cap": 1.2, "ratio_anchor": "sampler"},
    "sapo": {"loss": "sapo", "sapo_tau_pos": 1.3, "sapo_tau_neg": 2.1},
    "dppo_tv": {"loss": "dppo_tv", "dppo_tv": 0.05, "ratio_anchor": "sampler"},
    "reinforce": {"loss": "reinforce"},
}
# What acts beside the token loss; corrections are for losses anchored at the old policy.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "tis token": {"correction": "tis", "correction_max": 1.2},
    "tis sequence": {
        "correction": "tis",
        "correction_max": 1.05,
        "correction_level": "sequence",
    },
    "icepop token": {"correction": "icepop", "correction_min": 0.8, "correction_max": 1.3},
    "icepop sequence": {
        "correction": "icepop",
        "correction_min": 0.9,
        "correction_max": 1.2,
        "correction_level": "sequence",
    },
}
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "off-policy mask": {"off_policy_threshold": 0.05},
    "top entropy": {"top_entropy_frac": 0.4},
    "entropy bonus": {"entropy_coef": 0.07},
    "k3": {"beta": 0.3},
    "k2": {"beta": 0.3, "kl_estimator": "k2"},
    "unbiased": {"beta": 0.3, "kl_unbiased": True},
    "all": {
        "off_policy_threshold": 0.05,
        "top_entropy_frac": 0.6,
        "entropy_coef": 0.07,
        "beta": 0.3,
        "kl_unbiased": True,
    },
}


def options_for(loss: str, beside: str, aggregation: str) -> dict[str, Any]:
    """A loss section's keys, for the project and for the oracle."""
    return {
        **LOSSES[loss],
        **(CORRECTIONS.get(beside) or BESIDE[beside]),
        "aggregation": aggregation,
        "max_completion_length": LMAX,
    }


def sides_of(loss: str) -> list[str]:
    """What may stand beside a loss."""
    anchored = LOSSES[loss].get("ratio_anchor") == "sampler"
    return [*BESIDE, *([] if anchored else CORRECTIONS)]


CASES = [(loss, beside) for loss in LOSSES for beside in sides_of(loss)]


def make_sequences(seed: int, count: int = 6) -> list[Sequence_]:
    """Random completions with perturbed old, sampler and reference logprobs (law 7)."""
    rng = random.Random(seed)
    sequences = []
    for index in range(count):
        length = rng.randint(1, LMAX)
        # One of three has no trained token at all, but for the first, so that something is trained.
        trained = index == 0 or rng.random() < 2 / 3
        new = [-rng.expovariate(0.7) for _ in range(length)]
        sequences.append(
            Sequence_(
                new=new,
                old=[v + rng.gauss(0, 0.4) for v in new],
                sampler=[v + rng.gauss(0, 0.5) for v in new],
                ref=[v + rng.gauss(0, 0.6) for v in new],
                entropy=[rng.expovariate(1) for _ in range(length)],
                mask=[trained and (t == 0 or rng.random() < 0.8) for t in range(length)],
                advantage=rng.gauss(0, 1),
                group=index // 2,
            )
        )
    return sequences


def weights_of(sequences: Sequence[Sequence_], aggregation: str) -> Tensor:
    return loss_weights_for(
        aggregation,  # type: ignore[arg-type]
        [s.length for s in sequences],
        [s.group for s in sequences],
        LMAX,
    )


def rows_of(
    sequences: Sequence[Sequence_], order: Sequence[int], layout: Layout
) -> list[list[int]]:
    """Which sequences lie in each row: one; up to three of any group; or a group's behind one
    prompt."""
    if layout == "padded":
        return [[index] for index in order]
    if layout == "packed":
        return [list(order[start : start + 3]) for start in range(0, len(order), 3)]
    groups: dict[int, list[int]] = {}
    for index in order:
        groups.setdefault(sequences[index].group, []).append(index)
    return list(groups.values())


Places = dict[int, tuple[int, int]]


def make_inputs(
    sequences: Sequence[Sequence_],
    weights: Tensor,
    order: Sequence[int],
    layout: Layout = "padded",
) -> tuple[LossInputs, Places]:
    """Rows [B, T] behind prompts of two tokens, garbage wherever nothing is trained.

    Also where each sequence begins, (row, column). Sequences are numbered as they come.
    """
    rows = rows_of(sequences, order, layout)
    places: Places = {}
    for number, row in enumerate(rows):
        column = 0
        for offset, index in enumerate(row):
            column += PROMPT if offset == 0 or layout == "packed" else 0
            places[index] = (number, column)
            column += len(sequences[index].new)
    width = max(column + len(sequences[i].new) for i, (_, column) in places.items()) + 1
    shape = (len(rows), width)

    def grid(name: str) -> Tensor:
        out = torch.full(shape, GARBAGE, dtype=torch.float64)
        for index, (row, column) in places.items():
            values = getattr(sequences[index], name)
            out[row, column : column + len(values)] = torch.tensor(values, dtype=torch.float64)
        return out

    mask = torch.zeros(shape, dtype=torch.bool)
    ids = torch.full(shape, -1)
    for number, (index, (row, column)) in enumerate(places.items()):
        here = slice(column, column + len(sequences[index].new))
        mask[row, here] = torch.tensor(sequences[index].mask)
        ids[row, here] = number
    present = list(places)
    advantages = torch.tensor([sequences[i].advantage for i in present], dtype=torch.float64)
    inputs = LossInputs(
        logprobs=grid("new").requires_grad_(),
        old_logprobs=grid("old"),
        sampler_logprobs=grid("sampler"),
        ref_logprobs=grid("ref"),
        entropies=grid("entropy").requires_grad_(),
        loss_mask=mask,
        policy_mask=None,
        sequence_ids=ids,
        advantages=advantages,
        loss_weights=weights.double()[present],
    )
    return inputs, places


def with_policy_mask(inputs: LossInputs, bar: float) -> LossInputs:
    """The same with the mask of a whole update's top entropies, from its threshold."""
    assert inputs.entropies is not None
    # float32, as the learner's threshold is; no two of the drawn entropies are that close.
    mask = inputs.loss_mask & (inputs.entropies.detach() >= bar - 1e-6)
    return replace(inputs, policy_mask=mask)


def gradients_of(
    inputs: LossInputs, places: Places, sequences: Sequence[Sequence_]
) -> list[Tensor]:
    """After a backward pass: [logprobs and entropies, C] of each sequence in ``places``."""
    assert inputs.entropies is not None
    pair = [
        torch.zeros_like(values) if values.grad is None else values.grad
        for values in (inputs.logprobs, inputs.entropies)
    ]
    return [
        torch.stack([g[row, column : column + len(sequences[index].new)] for g in pair])
        for index, (row, column) in sorted(places.items())
    ]


def config_of(options: dict[str, Any]) -> LossConfig:
    """Without the aggregation, which is in the weights."""
    beside = ("aggregation", "max_completion_length")
    return LossConfig(**{name: value for name, value in options.items() if name not in beside})
