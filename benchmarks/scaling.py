"""Throughput from one generator to many, while nothing but the generators could be in the way.

    python benchmarks/scaling.py [--generators 1 2 4 8 16 32 64] [--group-s 8] [--runs 3]

Engines and learner are simulated (see simulated.py): a group takes ``--group-s`` seconds, an engine
writes four at once, an update takes next to nothing. Actors, scorers with their children, weight
store, rollout store, window and driver are real. Linear is the groups a second that so many engines
can write. The bar is 0.9 of that for every count; the exit code is 1 where it is missed.

On a cluster each generator has cores of its own. Here all of them share this machine's, so the
default group takes 8 s (a real one takes seconds to minutes): with 64 generators on 2 cores and
groups of 2 s, both cores are full and it is they that are measured. The columns show it: the
machine's CPU use during the measured steps, and the driver process's share of one core. The whole
takes about 40 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.simulated import Measured, simulate

AT_ONCE, STALENESS = 4, 3
BAR = 0.9


def measure(directory: Path, name: str, count: int, args: argparse.Namespace) -> Measured:
    """One run: a step is what the generators write in ``--rounds`` rounds."""
    return simulate(
        directory,
        name,
        group_s=args.group_s,
        update_s=0.05,
        spread=args.spread,
        warmup=2 + STALENESS,
        train={
            # The last steps are left out too: nothing is admitted any more.
            "steps": args.steps + 2 * STALENESS + 2,
            "groups_per_step": count * AT_ONCE * args.rounds,
            "max_staleness": STALENESS,
        },
        sampling={"num_completions": 4, "max_tokens": 64},
        generators={"engine": "transformers", "count": count, "max_rows": 4 * AT_ONCE},
        scorers={"count": args.scorers},
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--group-s", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=1, help="groups of a step that a slot writes")
    parser.add_argument("--spread", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--scorers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(arguments)
    names = ["generators", "groups/s", "of linear", "generators idle", "machine's CPU"]
    names += ["driver, of a core", "driver, ms a group"]
    print(f"| {' | '.join(names)} |\n{'| --- ' * len(names)}|")
    worst = 1.0
    for count in args.generators:
        with tempfile.TemporaryDirectory() as directory:
            runs = [
                measure(Path(directory), f"run-{number}", count, args)
                for number in range(args.runs)
            ]
        rates = [rate(run, args.steps) for run in runs]
        linear = count * AT_ONCE / args.group_s
        share = statistics.median(rates) / linear
        idle = [v for run in runs for v in run.values("timing/generator_idle_frac")[: args.steps]]
        used = [run.cpu_use(args.steps) for run in runs]
        machine, own = (statistics.median(column) for column in zip(*used, strict=True))
        driver = statistics.median(run.driver_ms_per_group for run in runs)
        print(
            f"| {count} | {statistics.median(rates):.1f} | {share:.2f} "
            f"| {statistics.median(idle):.0%} | {machine:.0%} | {own:.0%} | {driver:.1f} |",
            flush=True,
        )
        worst = min(worst, share)
    print(f"at least {BAR} of linear for every count: {'holds' if worst >= BAR else 'FAILS'}")
    return int(worst < BAR)


def rate(run: Measured, steps: int) -> float:
    """Groups a second that came back during the measured steps."""
    rows = run.rows[:steps]
    return sum(row["num_groups"] for row in rows) / sum(row["step_time"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
