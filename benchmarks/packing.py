"""How full packed microbatches are, and how evenly ranks are loaded.

    python benchmarks/packing.py

Groups of log-normal completion lengths (median 400 tokens, a long tail up to the limit) are placed
on ranks as training places them. Padding is the share of positions that hold no token, in what
the learner computes; attention cost counts the pairs of tokens that attend to each other. For
comparison, the same step in rows of one sample each, sorted by length and padded to the longest.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from raygrpo.algorithm.packing import (
    MicrobatchPlan,
    RowLayout,
    attention_pairs,
    place,
    row_length,
    trees_of,
)
from raygrpo.types import PlannedSample, StepBatch

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
    random = np.random.default_rng(seed)
    samples = []
    for group_id in range(options.groups):
        prompt = int(random.integers(50, 400))
        shape = options.completions
        drawn = random.lognormal(np.log(options.median), options.sigma, shape)
        for index, length in enumerate(drawn.clip(1, options.limit).astype(int).tolist()):
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
    payloads = dict.fromkeys(range(options.groups))
    return StepBatch(step=0, minibatches=(tuple(samples),), payloads=payloads, versions={})


def measure(batch: StepBatch, layout: RowLayout, options: argparse.Namespace) -> dict[str, float]:
    """Shares of padding, imbalances (busiest rank over mean, less 1), tokens, microbatches."""
    start = time.perf_counter()
    placed = place(
        batch,
        options.ranks,
        tokens_per_microbatch=options.budget,
        layout=layout,
        attention_length=6.0 * options.hidden_size,
    )
    seconds = time.perf_counter() - start
    ranks: list[list[MicrobatchPlan]] = [minibatches[0] for minibatches in placed]
    rows = [[row for microbatch in rank for row in microbatch] for rank in ranks]
    tokens = np.array([sum(map(row_length, rank)) for rank in rows])
    grid = sum(len(m) * max(map(row_length, m)) for rank in ranks for m in rank)
    pairs = np.array(
        [sum(attention_pairs(t) for row in rank for t in trees_of(row)) for rank in rows]
    )
    found = sum(not s.filler for rank in rows for row in rank for s in row)
    assert found == len(batch.minibatches[0]), "a sample is missing"
    return {
        "padding": 1 - tokens.sum() / grid,
        "attention imbalance": pairs.max() / pairs.mean() - 1,
        "token imbalance": tokens.max() / tokens.mean() - 1,
        "tokens": float(tokens.sum()),
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
    holds = worst["padding"] < PADDING_BAR and worst["attention imbalance"] < IMBALANCE_BAR
    print(
        f"packed: padding below {PADDING_BAR:.0%} and attention imbalance below "
        f"{IMBALANCE_BAR:.0%}: {'holds' if holds else 'FAILS'}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
