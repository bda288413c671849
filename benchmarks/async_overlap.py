"""Generation beside training: how long a step takes when both take equally long.

    python benchmarks/async_overlap.py [--seconds 2] [--steps 12] [--staleness 2] [--runs 3]

Engines and learner are simulated (see simulated.py), so that the two times are known and equal; the
driver, the window, the pool, scorers, weight store, rollout store and recording are real. The bars:
an asynchronous step takes at most 1.1 times the longer of the two, an on-policy one at least 1.8
times (nearly their sum), and no trained group is older than the bound. The exit code is 1 where one
is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.simulated import Measured, simulate

GENERATORS, GROUPS_PER_GENERATOR = 2, 4
ASYNC_BAR, SYNC_BAR = 1.1, 1.8


def measure(directory: Path, name: str, staleness: int, args: argparse.Namespace) -> Measured:
    """One run: each generator writes its four groups of a step one after the other."""
    return simulate(
        directory,
        name,
        group_s=args.seconds / GROUPS_PER_GENERATOR,
        update_s=args.seconds,
        spread=args.spread,
        warmup=2 + staleness,
        train={
            "steps": args.steps + 2 + staleness,
            "groups_per_step": GENERATORS * GROUPS_PER_GENERATOR,
            "max_staleness": staleness,
        },
        sampling={"num_completions": 4, "max_tokens": 32},
        generators={"engine": "transformers", "count": GENERATORS, "max_rows": 4},
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--staleness", type=int, default=2)
    parser.add_argument("--spread", type=float, default=0.2)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(arguments)
    print(
        "| mode | step / max(generation, training) | generators idle | learner waits | staleness |"
    )
    print("| --- | --- | --- | --- | --- |")
    ratios, within = {}, True
    for staleness in (0, args.staleness):
        with tempfile.TemporaryDirectory() as directory:
            runs = [
                measure(Path(directory), f"run-{number}", staleness, args)
                for number in range(args.runs)
            ]
        # Steps of a run compensate each other, so a run's figure is its mean; runs do not.
        ratios[staleness] = statistics.median(
            statistics.fmean(run.values("step_time")) / args.seconds for run in runs
        )
        shares = [
            statistics.median(value for run in runs for value in run.values(f"timing/{name}"))
            for name in ("generator_idle_frac", "learner_wait_frac")
        ]
        oldest = max(value for run in runs for value in run.values("staleness/max"))
        mode = f"asynchronous ({staleness})" if staleness else "on-policy"
        print(
            f"| {mode} | {ratios[staleness]:.2f} | {shares[0]:.0%} | {shares[1]:.0%} "
            f"| at most {oldest:g} |",
            flush=True,
        )
        within &= oldest <= staleness
    holds = ratios[args.staleness] <= ASYNC_BAR and ratios[0] >= SYNC_BAR and within
    print(
        f"asynchronous at most {ASYNC_BAR}, on-policy at least {SYNC_BAR}, staleness within its "
        f"bound: {'holds' if holds else 'FAILS'}"
    )
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
