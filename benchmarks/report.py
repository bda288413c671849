"""From observed runs to a page of Markdown: the table, the bars, and the curves."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.observe import Run, reached

OURS = "raygrpo"
CURVE_BAR = 0.5  # of TRL's wall-clock


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of a forward pass over a step's rows, and FLOP/s of a plain matrix product."""

    forward: float
    plain: float

    def shares(self, seconds: float, train_s: float) -> tuple[float, float]:
        """Of the plain product: the update's (forward and backward), and the whole step's, to which
        generation adds a forward pass."""
        return 3 * self.forward / train_s / self.plain, 4 * self.forward / seconds / self.plain


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


def speed_table(runs: Sequence[Run], flops: Flops | None = None) -> list[str]:
    """One line a side."""
    names = ["side", "s/step (min to max)", "generation", "training", "other", "tokens/s"]
    names += ["peak memory", *(["update/matmul", "step/matmul"] if flops else [])]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for side, members in by_side(runs).items():
        seconds = [value for run in members for value in steady(run)]
        parts = [split for run in members for split in run.split()[1:] or run.split()]
        split = [statistics.median(column) for column in zip(*parts, strict=True)]
        rates = [
            step.num_completion_tokens / taken
            for run in members
            for step, taken in list(zip(run.steps, run.step_seconds, strict=True))[1:]
            or zip(run.steps, run.step_seconds, strict=True)
        ]
        median = statistics.median(seconds)
        cells = [side, f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"]
        cells += [f"{value:.2f}" for value in split]
        cells.append(f"{statistics.median(rates):.0f}")
        cells.append(f"{max(run.peak_bytes for run in members) / 2**30:.2f} GiB")
        if flops is not None:
            cells += [f"{share:.2f}" for share in flops.shares(median, split[1])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def fastest_peer(runs: Sequence[Run]) -> str | None:
    """TRL's faster precision; None when TRL did not run."""
    peers = {side: median_seconds(m) for side, m in by_side(runs).items() if side != OURS}
    return min(peers, key=lambda side: peers[side]) if peers else None


def speed_verdict(runs: Sequence[Run], bar: float | None) -> tuple[list[str], bool]:
    """How many times as fast as the faster TRL, and whether the bar holds."""
    sides, peer = by_side(runs), fastest_peer(runs)
    if peer is None or OURS not in sides:
        return [], True
    ratio = median_seconds(sides[peer]) / median_seconds(sides[OURS])
    pairs = [
        median_seconds([theirs]) / median_seconds([ours])
        for ours, theirs in zip(sides[OURS], sides[peer], strict=False)
    ]
    holds = bar is None or ratio >= bar
    asked = "No bar is asked for this workload and engine."
    if bar is not None:
        asked = f"Bar, a step {bar:g} times as fast: {'holds' if holds else 'FAILS'}."
    return [
        f"A step of raygrpo is {ratio:.2f} times as fast as one of {peer}, the faster of TRL's "
        f"({min(pairs):.2f} to {max(pairs):.2f} over the pairs).",
        asked,
    ], holds


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


def target_verdict(runs: Sequence[Run], target: float, window: int) -> tuple[list[str], bool]:
    """Whether raygrpo's median wall-clock from process start is at most half of the best TRL's.

    A run of TRL that did not get there counts with the time that it ran: it would take longer.
    """
    times: dict[str, float] = {}
    for side, members in by_side(runs).items():
        values = []
        for run in members:
            found = seconds_to_target(run, target, window)
            if found is None and side == OURS:
                return [f"raygrpo did not reach {target} in every run: the bar FAILS."], False
            values.append(found[1] if found else run.ended_s[-1])
        times[side] = statistics.median(values)
    peers = [value for side, value in times.items() if side != OURS]
    if OURS not in times or not peers:
        return [], True
    ratio = times[OURS] / min(peers)
    holds = ratio <= CURVE_BAR
    return [
        f"raygrpo's wall-clock from process start is {ratio:.2f} of the faster TRL's.",
        f"Bar, half of TRL's: {'holds' if holds else 'FAILS'}.",
    ], holds


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


def report(runs: Sequence[Run], options: Namespace, flops: Flops | None = None) -> tuple[str, bool]:
    """The whole page, and whether the bar holds."""
    shape = f"{options.prompts} prompts x {options.completions} completions"
    if options.speed:
        shape += f" x ({options.prompt_tokens} + {options.new_tokens} tokens)"
    where = f"{options.model}, engine {options.engine}, {options.device}"
    lines = [f"{options.workload}: {shape}, {where}, {options.pairs} pairs", ""]
    lines += [*speed_table(runs, flops), ""]
    if options.speed:
        verdict, holds = speed_verdict(runs, options.bar)
    else:
        lines += [*target_table(runs, options.target, options.window), ""]
        verdict, holds = target_verdict(runs, options.target, options.window)
    lines += verdict
    if flops is not None:
        lines.append(f"A plain matrix product in {options.dtype}: {flops.plain / 1e9:.0f} GFLOP/s.")
    if options.curves:
        lines += curve_table(runs, options.window)
    return "\n".join(lines), holds
