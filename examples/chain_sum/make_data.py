"""Writes train.jsonl and test.jsonl: reasoning-gym's chain_sum with 2 terms of 1 digit.

There are only 200 such problems, so the split is by problem: none of the test problems is ever
trained on. Run from the repository's root: python examples/chain_sum/make_data.py
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import reasoning_gym

NUM_DRAWN = 20_000
NUM_TEST = 40
SEED = 0


def main() -> None:
    """Draws until every problem has appeared, then splits them at random."""
    drawn = reasoning_gym.create_dataset(
        "chain_sum",
        size=NUM_DRAWN,
        seed=SEED,
        min_terms=2,
        max_terms=2,
        min_digits=1,
        max_digits=1,
    )
    problems = sorted({(row["question"], row["answer"]) for row in drawn})
    random.Random(SEED).shuffle(problems)
    splits = {"test": problems[:NUM_TEST], "train": problems[NUM_TEST:]}
    here = Path(__file__).parent
    for name, rows in splits.items():
        lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
        (here / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        answer, count = Counter(a for _, a in rows).most_common(1)[0]
        print(f"{name}: {len(rows)} problems; always {answer!r} scores {count / len(rows):.3f}")


if __name__ == "__main__":
    main()
