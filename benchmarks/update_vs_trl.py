"""The update alone against TRL's: forward, loss, backward, optimizer on the same stored rollouts.

    python benchmarks/update_vs_trl.py                               # SmolLM2, 4 x 8 x (105 + 64)
    python benchmarks/update_vs_trl.py --workload long_prompt        # SmolLM2, 2 x 16 x (256 + 32)
    python benchmarks/update_vs_trl.py --workload gemma                # Gemma 3, 4 x 8 x (12 + 32)
    python benchmarks/update_vs_trl.py --parity                        # the same loss and gradient?
    python benchmarks/update_vs_trl.py --device cuda --model 1.5b      # a shape, random weights

Each side is a process of its own on --threads threads, and they take turns: ours (DeepSpeed, bf16
with fp32 masters, recipe trl024), TRL's GRPOTrainer with all in bf16, and with fp32 weights and
bf16 autocast. A side's time begins with the rollouts in memory and ends with the new weights; ours
includes making rows of them. TRL runs without activation checkpointing, faster than its default,
in microbatches of --microbatch completions. The bar holds against the faster of TRL's two; where
it fails, the exit code is 1.

FLOP/s are of matrix products, as a share of what a plain one reaches here in bf16 (on a GPU: MFU).
``of the task`` counts separate, unpadded rows, the same for both sides: who shares a group's prompt
computes less than that, so its share may exceed 1. ``executed`` counts what our side computes: each
position of its rows, padding included, and each pair of positions in its attention kernels.

--parity: one update in fp32 on both sides with the same stored old logprobs, which are the model's
own with noise added; loss, norm and direction of the gradient before clipping must agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.flops import Work, matmul_flops, separate_rows, update_flops  # noqa: E402
from benchmarks.shapes import SHAPES, WORKLOADS, Workload, model_directory  # noqa: E402
from benchmarks.update_sides import serve  # noqa: E402

SIDES = ("raygrpo", "TRL bf16", "TRL autocast")
FLOAT32_SIDES = ("raygrpo", "TRL fp32")
PARITY_TOLERANCE = 1e-4


# Times as fast as TRL's update, by workload.
BARS = {"smollm2": 2.5, "long_prompt": 3.0, "gemma": 1.5}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--workload", choices=list(WORKLOADS), default="smollm2")
    shapes = ", ".join(SHAPES)
    add("--model", help=f"model directory, or a shape ({shapes}); none: the workload's")
    add("--pairs", type=int, default=5, help="measured rounds, one update of each side a round")
    add("--quick", action="store_true", help="one measured round, TRL in bf16 only")
    add("--threads", type=int, default=2, help="threads of each side")
    add("--microbatch", type=int, default=8, help="completions that TRL trains at once")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--sides", nargs="+", choices=sorted({*SIDES, *FLOAT32_SIDES}))
    add("--float32", action="store_true", help="both sides in float32, for CPUs without bfloat16")
    add("--set", nargs="*", default=[], help="our configuration: section.key=value")
    add("--parity", action="store_true", help="compare one fp32 update instead of timing")
    add("--matmul-size", type=int, help="of the plain product; none: 2048, on a GPU 8192")
    add("--profile", type=Path, help="write the operators of our last update here")
    add("--json", type=Path, help="write everything that was measured here")
    options = parser.parse_args(arguments)
    sides = FLOAT32_SIDES if options.float32 else SIDES
    options.sides = options.sides or list(sides)
    if options.quick:
        options.pairs, options.sides = 1, list(sides[:2])
    return options


def make_rollouts(model: str, size: Workload, seed: int = 0) -> list[dict[str, Any]]:
    """Groups of token ids of English-like text; prompts within 5 % of their length, rewards 0 or 1.

    Completions have the workload's length exactly, as TRL's padding would cost it more otherwise.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    random = np.random.default_rng(seed)
    words = (
        "the of and to in is that it was for on are with as at be this have from or one had by"
        " word but not what all were we when your can said there use an each which"
    )

    def text(num_tokens: int) -> list[int]:
        drawn = " ".join(random.choice(words.split(" "), 2 * num_tokens))
        ids: list[int] = tokenizer(drawn, add_special_tokens=False)["input_ids"][:num_tokens]
        return ids

    groups = []
    for _ in range(size.prompts):
        spread = size.prompt_tokens // 20
        rewards = random.permutation(np.arange(size.completions) % 2).tolist()
        completions = [text(size.new_tokens) for _ in range(size.completions)]
        length = size.prompt_tokens + int(random.integers(-spread, spread + 1))
        noise = random.normal(0, 0.1, (size.completions, size.new_tokens)).tolist()
        groups.append(
            {
                "prompt": text(length),
                "completions": completions,
                "rewards": [float(reward) for reward in rewards],
                "noise": noise,
            }
        )
    return groups


class Side:
    """A process that makes one update each time it is asked."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(spec["threads"])
        self._process = context.Process(target=serve, args=(name, spec, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def ask(self, request: str) -> Any:
        """What the process answers; raises EOFError when it dies."""
        self._pipe.send(request)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send("end")
        self._process.join(60)
        self._process.kill()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """By side: (seconds, CPU-seconds) of each update, and peak memory in GB; our side's work."""

    taken: dict[str, list[tuple[float, float]]]
    peaks: dict[str, float]
    work: Work | None

    def medians(self, index: int) -> dict[str, float]:
        """Of the seconds (0) or CPU-seconds (1)."""
        return {n: statistics.median(t[index] for t in taken) for n, taken in self.taken.items()}


def measure(options: argparse.Namespace, spec: dict[str, Any]) -> Measured:
    """Updates in alternating order; the first round is left out."""
    sides = [Side(name, spec) for name in options.sides]
    found = Measured(taken={side.name: [] for side in sides}, peaks={}, work=None)
    for number in range(options.pairs + 1):
        for side in sides if number % 2 == 0 else reversed(sides):
            taken, cpu = side.ask("update")
            if number:
                found.taken[side.name].append((taken, cpu))
            note = "" if number else " (warming up)"
            print(f"# {side.name}: {taken:.2f} s, {cpu:.2f} CPU-s{note}", flush=True)
    for side in sides:
        found.peaks[side.name] = side.ask("peak")
        if side.name == "raygrpo":
            found = replace(found, work=side.ask("work"))
            if options.profile:
                options.profile.write_text(side.ask("profile"))
        side.close()
    return found


def report(
    found: Measured, flops: dict[str, float], plain: float, bar: float
) -> tuple[list[str], bool]:
    """The table of medians, and whether the bar holds.

    ``flops`` has those ``of the task`` and, where our side ran, those ``executed`` by it.
    """
    seconds, cpu = found.medians(0), found.medians(1)
    lines = [
        "| side | median s (range) | CPU-s | peak GB | of the task: GFLOP/s (share of a matrix "
        "product) | executed: GFLOP/s (share) |",
        "| - | - | - | - | - | - |",
    ]

    def rate(kind: str, name: str) -> str:
        value = flops[kind] / seconds[name]
        return f"{value / 1e9:.0f} ({value / plain:.2f})"

    for name, median in seconds.items():
        walls = [wall for wall, _ in found.taken[name]]
        ran = rate("executed", name) if name == "raygrpo" else ""
        lines.append(
            f"| {name} | {median:.2f} ({min(walls):.2f} to {max(walls):.2f}) | {cpu[name]:.2f} "
            f"| {found.peaks[name]:.2f} | {rate('of the task', name)} | {ran} |"
        )
    peers = [name for name in seconds if name != "raygrpo"]
    if not peers or "raygrpo" not in seconds:
        return lines, True
    ratios = [min(column[p] for p in peers) / column["raygrpo"] for column in (seconds, cpu)]
    holds = ratios[0] >= bar
    lines.append(
        f"raygrpo is {ratios[0]:.2f} times as fast as the faster of TRL's "
        f"(CPU-seconds: {ratios[1]:.2f}): the bar of {bar} {'holds' if holds else 'FAILS'}."
    )
    return lines, holds


def compare(options: argparse.Namespace, spec: dict[str, Any]) -> list[str]:
    """One fp32 update of both sides; lines of differences.

    Raises:
        SystemExit: they differ by more than the tolerance.
    """
    import torch

    found = {}
    for name in ("raygrpo", "TRL fp32"):
        side = Side(name, spec)
        loss = side.ask("parity")
        side.close()
        found[name] = (loss, torch.load(Path(spec["work"]) / f"{name}.pt"))
    (our_loss, ours), (loss, theirs) = found.values()
    assert ours.keys() == theirs.keys()
    dots = [(ours[k].double() * theirs[k].double()).sum() for k in ours]
    norms = [
        float(sum(g.double().square().sum() for g in side.values()) ** 0.5)
        for side in (ours, theirs)
    ]
    gap = float(sum((ours[k].double() - theirs[k]).square().sum() for k in ours) ** 0.5)
    values = {
        "loss": abs(our_loss - loss) / abs(loss),
        "gradient norm": abs(norms[0] - norms[1]) / norms[1],
        "gradient direction (1 - cosine)": 1 - float(sum(dots)) / (norms[0] * norms[1]),
        "gradient": gap / norms[1],
    }
    lines = [f"loss {our_loss:.8f} and {loss:.8f}; norms {norms[0]:.6f} and {norms[1]:.6f}"]
    lines += [f"relative difference of the {name}: {value:.1e}" for name, value in values.items()]
    if max(values.values()) > PARITY_TOLERANCE:
        raise SystemExit("\n".join([*lines, f"more than {PARITY_TOLERANCE}"]))
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 when the bar is missed."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as work:
        return run(options, work)


def make_spec(options: argparse.Namespace, model: str, work: str) -> dict[str, Any]:
    """What a side needs to know."""
    return {
        "model": model,
        "groups": make_rollouts(model, WORKLOADS[options.workload]),
        "work": work,
        "threads": options.threads,
        "microbatch": options.microbatch,
        "device": options.device,
        "steps": options.pairs + 1,
        "set": options.set,
        "parity": options.parity,
        "dtype": "float32" if options.parity or options.float32 else "bfloat16",
    }


def run(options: argparse.Namespace, work: str) -> int:
    """Measures, or compares, in a directory."""
    size = WORKLOADS[options.workload]
    model = model_directory(options.model, size.model, work)
    spec = make_spec(options, model, work)
    if options.parity:
        print("\n".join(compare(options, spec)))
        return 0
    found = measure(options, spec)
    lengths = [(len(g["prompt"]), [len(c) for c in g["completions"]]) for g in spec["groups"]]
    flops = {"of the task": update_flops(model, separate_rows(lengths))}
    if found.work is not None:
        flops["executed"] = update_flops(model, found.work)
    machine = (options.device, options.threads, options.matmul_size)
    plain = matmul_flops(spec["dtype"], *machine)
    print(f"# a plain matrix product: {spec['dtype']} {plain / 1e9:.0f} GFLOP/s")
    lines, holds = report(found, flops, plain, BARS[options.workload])
    print("\n".join(lines))
    if options.json:
        shown = {name: str(value) for name, value in vars(options).items()}
        measured = {"options": shown, "seconds": found.taken, "peak_gb": found.peaks}
        options.json.write_text(json.dumps({**measured, "flops": flops, "matmul": plain}, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
