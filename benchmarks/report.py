"""From observed runs to a page of Markdown: the table, the bars, and the curves."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence

from benchmarks.observe import Run, reached

OURS = "raygrpo"
SPEED_BAR, CURVE_BAR = 1.0, 0.5


def by_side(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each side, raygrpo first."""
    sides = sorted({run.side for run in runs}, key=lambda side: (side != OURS, side))
    return {side: [run for run in runs if run.side == side] for side in sides}


def steady(run: Run) -> list[float]:
    """Seconds of the steps after the first, which warms up; of that one when it is alone."""
    return run.step_seconds[1:] or run.step_seconds


def median_seconds(runs: Sequence[Run]) -> float:
    """The median over the steady steps of all runs."""
    return statistics.median([seconds for run in runs for seconds in steady(run)])


def speed_table(runs: Sequence[Run]) -> list[str]:
    """One line a side."""
    lines = [
        "| | s/step (min to max) | generation | training | other | tokens/s | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for side, members in by_side(runs).items():
        seconds = [value for run in members for value in steady(run)]
        parts = [split for run in members for split in run.split()[1:] or run.split()]
        split = " | ".join(
            f"{statistics.median(column):.2f}" for column in zip(*parts, strict=True)
        )
        rates = [
            step.num_completion_tokens / taken
            for run in members
            for step, taken in list(zip(run.steps, run.step_seconds, strict=True))[1:]
            or zip(run.steps, run.step_seconds, strict=True)
        ]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        peak = max(run.peak_bytes for run in members) / 2**30
        lines.append(
            f"| {side} | {spread} | {split} | {statistics.median(rates):.0f} | {peak:.2f} GiB |"
        )
    return lines


def fastest_peer(runs: Sequence[Run]) -> str | None:
    """TRL's faster precision; None when TRL did not run."""
    peers = {side: median_seconds(m) for side, m in by_side(runs).items() if side != OURS}
    return min(peers, key=lambda side: peers[side]) if peers else None


def speed_verdict(runs: Sequence[Run]) -> list[str]:
    """The ratio to the faster TRL, and whether the bar holds."""
    sides, peer = by_side(runs), fastest_peer(runs)
    if peer is None or OURS not in sides:
        return []
    ratio = median_seconds(sides[OURS]) / median_seconds(sides[peer])
    pairs = [
        median_seconds([ours]) / median_seconds([theirs])
        for ours, theirs in zip(sides[OURS], sides[peer], strict=False)
    ]
    holds = "holds" if ratio <= SPEED_BAR else "FAILS"
    return [
        f"A step of raygrpo takes {ratio:.2f} of {peer}'s, the faster of TRL's "
        f"({min(pairs):.2f} to {max(pairs):.2f} over the pairs).",
        f"Bar, no slower than TRL a step: {holds}.",
    ]


def seconds_to_target(run: Run, target: float, window: int) -> tuple[int, float, float] | None:
    """(step, seconds from the start, seconds from the first step); None if it was not reached."""
    index = reached(run.steps, target, window)
    if index is None:
        return None
    return run.steps[index].number, run.ended_s[index], run.ended_s[index] - run.ready_s


def target_table(runs: Sequence[Run], target: float, window: int) -> list[str]:
    """One line a run: when the mean accuracy over ``window`` steps reached ``target``."""
    lines = [
        f"| to {target} over {window} steps | step | from process start | from the first step |",
        "| --- | --- | --- | --- |",
    ]
    for side, members in by_side(runs).items():
        for run in members:
            found = seconds_to_target(run, target, window)
            if found is None:
                best = max((step.reward for step in run.steps), default=0.0)
                cells = f"not in {len(run.steps)} steps (best {best:.2f}) | | "
            else:
                cells = f"{found[0]} | {found[1]:.0f} s | {found[2]:.0f} s"
            lines.append(f"| {side} | {cells} |")
    return lines


def target_verdict(runs: Sequence[Run], target: float, window: int) -> list[str]:
    """Whether raygrpo's median wall-clock from process start is at most half of the best TRL's.

    A run of TRL that did not get there counts with the time that it ran: it would take longer.
    """
    times: dict[str, float] = {}
    for side, members in by_side(runs).items():
        values = []
        for run in members:
            found = seconds_to_target(run, target, window)
            if found is None and side == OURS:
                return [f"raygrpo did not reach {target} in every run: the bar FAILS."]
            values.append(found[1] if found else run.ended_s[-1])
        times[side] = statistics.median(values)
    peers = [value for side, value in times.items() if side != OURS]
    if OURS not in times or not peers:
        return []
    ratio = times[OURS] / min(peers)
    holds = "holds" if ratio <= CURVE_BAR else "FAILS"
    return [
        f"raygrpo's wall-clock from process start is {ratio:.2f} of the faster TRL's.",
        f"Bar, half of TRL's: {holds}.",
    ]


def curve_table(runs: Sequence[Run], window: int) -> list[str]:
    """The mean accuracy over ``window`` steps against the seconds since the process started."""
    lines = []
    for run in runs:
        lines += ["", f"{run.side}: accuracy over {window} steps", "", "| step | s | mean |"]
        lines.append("| --- | --- | --- |")
        for index in range(window - 1, len(run.steps), window):
            mean = statistics.fmean(s.reward for s in run.steps[index + 1 - window : index + 1])
            number, seconds = run.steps[index].number, run.ended_s[index]
            lines.append(f"| {number} | {seconds:.0f} | {mean:.3f} |")
    return lines


def report(runs: Sequence[Run], options: Namespace) -> str:
    """The whole page."""
    shape = f"{options.prompts} prompts x {options.completions} completions"
    if options.workload == "speed":
        shape += f" x {options.new_tokens} new tokens"
    lines = [f"{options.workload}: {shape}, {options.model}, {options.pairs} pairs", ""]
    lines += speed_table(runs)
    if options.workload == "speed":
        lines += ["", *speed_verdict(runs)]
    else:
        lines += ["", *target_table(runs, options.target, options.window), ""]
        lines += target_verdict(runs, options.target, options.window)
    if options.curves:
        lines += curve_table(runs, options.window)
    return "\n".join(lines)
