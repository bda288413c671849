"""How full packed microbatches are, and how evenly ranks are loaded.

    python benchmarks/packing.py

Groups of log-normal completion lengths (median 400 tokens, a long tail up to the limit) are placed
on ranks as training places them.

- Token padding: the share of the positions that the network computes which hold no token, or one of
  a filler (a sample of no weight, which keeps a rank's number of microbatches equal).
- Attention padding: the same share of attention's query slots, and of its pairs of a query and a
  key, where what a mask hides counts too. Packed rows attend in batches of segments of like length,
  which are padded to the longest; other rows attend as they lie. A slot of padding costs attention
  alone, never a layer.
- Imbalance: the busiest rank over the mean, less 1, of the pairs of tokens that attend to each
  other, and of tokens.

The bars are on token padding and imbalance of attention. For comparison, the same step in rows of
one sample each, sorted by length and padded to the longest, and in rows that share their prompt.
The exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.flops import query_and_pairs
from raygrpo.algorithm.packing import (
    MicrobatchPlan,
    RowLayout,
    attention_pairs,
    make_microbatch,
    place,
    row_length,
    trees_of,
)
from raygrpo.learner.attention.segments import make_plan
from raygrpo.types import Group, PlannedSample, StepBatch
from tests import builders

PADDING_BAR, IMBALANCE_BAR = 0.02, 0.03


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--groups", type=int, default=64, help="groups of a step")
    add("--completions", type=int, default=8, help="completions of a group")
    add("--ranks", type=int, default=8)
    add("--budget", type=int, default=16384, help="tokens of a microbatch")
    add("--median", type=float, default=400, help="median tokens of a completion")
    add("--sigma", type=float, default=0.8, help="of the lengths' logarithm")
    add("--limit", type=int, default=4096, help="longest completion in tokens")
    add("--hidden-size", type=int, default=1536, help="of the model, for the cost of attention")
    add("--seeds", type=int, default=5, help="steps drawn")
    return parser.parse_args(arguments)


def make_step(options: argparse.Namespace, seed: int) -> StepBatch:
    """A step of random lengths whose payloads are groups of token 0."""
    random = np.random.default_rng(seed)
    samples, payloads = [], {}
    for group_id in range(options.groups):
        prompt = int(random.integers(50, 400))
        drawn = random.lognormal(np.log(options.median), options.sigma, options.completions)
        lengths = drawn.clip(1, options.limit).astype(int).tolist()
        payloads[group_id] = make_group(group_id, prompt, lengths)
        for index, length in enumerate(lengths):
            samples.append(
                PlannedSample(
                    group_id=group_id,
                    completion_index=index,
                    prompt_length=prompt,
                    completion_length=length,
                    num_loss_tokens=length,
                    advantage=0.0,
                    loss_weight=1.0,
                )
            )
    return StepBatch(step=0, minibatches=(tuple(samples),), payloads=payloads, versions={})


def make_group(group_id: int, prompt: int, lengths: list[int]) -> Group:
    """A group of these lengths in tokens."""
    request = builders.request(
        group_id, num_completions=len(lengths), tokens=[0] * prompt, max_tokens=max(lengths)
    )
    completions = [builders.completion([0] * length, finish="length") for length in lengths]
    return builders.group(request, completions)


def attention_slots(plan: MicrobatchPlan, batch: StepBatch, layout: RowLayout) -> tuple[int, int]:
    """Query slots and pairs that attention computes of a microbatch; pairs above the diagonal,
    which a causal kernel skips, are left out."""
    width = max(map(row_length, plan))
    if layout == "plain":
        return len(plan) * width, len(plan) * width * (width + 1) // 2
    if layout == "shared":  # under a mask over the row
        return len(plan) * width, len(plan) * width * width
    rows = make_microbatch(plan, batch.payloads)
    segments = make_plan(rows.positions, rows.segment_ids, rows.parent_ids, torch.device("cpu"))
    slots, pairs = zip(*map(query_and_pairs, segments.batches), strict=True)
    return sum(slots), sum(pairs)


def real_tokens(plan: MicrobatchPlan) -> int:
    """Tokens of a microbatch, those of fillers left out; a shared prompt counts once."""
    return sum(map(row_length, real_trees(plan)))


def real_trees(plan: MicrobatchPlan) -> list[tuple[PlannedSample, ...]]:
    """The trees of a microbatch without fillers."""
    trees = [tree for row in plan for tree in trees_of(row)]
    kept = (tuple(sample for sample in tree if not sample.filler) for tree in trees)
    return [tree for tree in kept if tree]


def measure(batch: StepBatch, layout: RowLayout, options: argparse.Namespace) -> dict[str, float]:
    """Shares of padding, imbalances, tokens, microbatches; see the module."""
    start = time.perf_counter()
    placed = place(
        batch,
        options.ranks,
        tokens_per_microbatch=options.budget,
        layout=layout,
        hidden_size=options.hidden_size,
    )
    seconds = time.perf_counter() - start
    ranks: list[list[MicrobatchPlan]] = [minibatches[0] for minibatches in placed]
    plans = [plan for rank in ranks for plan in rank]
    found = sum(len(tree) for plan in plans for tree in real_trees(plan))
    assert found == len(batch.minibatches[0]), "a sample is missing"
    real = sum(map(real_tokens, plans))
    grid = sum(len(plan) * max(map(row_length, plan)) for plan in plans)
    slots = np.array([attention_slots(plan, batch, layout) for plan in plans]).sum(0)
    useful = sum(attention_pairs(tree) for plan in plans for tree in real_trees(plan))
    # Ranks are compared by all that they compute, fillers included.
    rows = [[row for plan in rank for row in plan] for rank in ranks]
    tokens = np.array([sum(map(row_length, rank)) for rank in rows])
    pairs = np.array(
        [sum(attention_pairs(t) for row in rank for t in trees_of(row)) for rank in rows]
    )
    return {
        "token padding": 1 - real / grid,
        "attention slot padding": 1 - real / slots[0],
        "attention pair padding": 1 - useful / slots[1],
        "attention imbalance": pairs.max() / pairs.mean() - 1,
        "token imbalance": tokens.max() / tokens.mean() - 1,
        "tokens": float(real),
        "fillers": float(sum(s.filler for plan in plans for row in plan for s in row)),
        "microbatches": float(len(ranks[0])),
        "planning ms": seconds * 1e3,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    steps = [make_step(options, seed) for seed in range(options.seeds)]
    names = list(measure(steps[0], "packed", options))
    print(f"| rows | {' | '.join(f'worst {name}' for name in names)} |")
    print("| - |" + " - |" * len(names))
    layouts: tuple[RowLayout, ...] = ("plain", "shared", "packed")
    for layout in layouts:
        found = [measure(step, layout, options) for step in steps]
        worst = {name: max(values[name] for values in found) for name in names}
        shown = [
            f"{worst[name]:.2%}"
            if name.endswith(("padding", "imbalance"))
            else f"{worst[name]:.0f}"
            for name in names
        ]
        print(f"| {layout} | {' | '.join(shown)} |")
    holds = worst["token padding"] < PADDING_BAR and worst["attention imbalance"] < IMBALANCE_BAR
    print(
        f"packed: token padding (fillers included) below {PADDING_BAR:.0%}, imbalance of attention "
        f"below {IMBALANCE_BAR:.0%}: {'holds' if holds else 'FAILS'}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
