"""raygrpo against TRL: seconds a step, memory, and wall-clock to an accuracy, in alternating runs.

    python benchmarks/vs_trl.py                              # SmolLM2, 4 x 8 x (105 + 64)
    python benchmarks/vs_trl.py --engine vllm                # the same, where vLLM is installed
    python benchmarks/vs_trl.py --workload long_prompt       # SmolLM2, 2 x 16 x (256 + 32)
    python benchmarks/vs_trl.py --workload gemma             # Gemma 3, 4 x 8 x (12 + 32)
    python benchmarks/vs_trl.py --workload chain_sum --curves      # half the wall-clock to 0.7?
    python benchmarks/vs_trl.py --trl float32        # all in float32, for CPUs without bfloat16

Every run is a fresh process on the same model, prompts, group size, lengths and number of updates:
``python -m raygrpo train`` with Ray, generator, learner and scorers, and TRL's GRPOTrainer with
transformers' generation, once with all in bfloat16 and once with float32 weights and bfloat16
autocast; the bar holds against the faster (--trl names one; float32 is both sides' then). TRL gets
OMP_NUM_THREADS=--threads, raygrpo its defaults. TRL runs without activation checkpointing and in
microbatches of --microbatch completions, both faster than its defaults here. --device cuda is one
GPU: raygrpo's generator and learner share it, the generator asleep while the learner trains.

Workloads of speed: completions of exactly --new-tokens tokens on both sides, since no end may come
before (``min_new_tokens`` there, ``filters.min_tokens`` here), a reward that costs nothing, no
refill. The bars are each workload's; the exit code is 1 where one is missed.
chain_sum: examples/chain_sum/config.yaml as it stands but for its evaluations, which TRL does not
do; TRL with the same prompts, stop, group size, reward and constant rate. Runs end at the target,
unless --curves asks for both curves.

The last columns are FLOP/s of matrix products as a share of what a plain one reaches in that dtype:
of the update, and of the whole step, counted for one unpadded row a completion (generation: a
forward pass), the same for both sides. Who shares prompts computes less than that.

A step's seconds are taken by this program, from the arrival of the rows that both sides write when
a step has ended. The first step (warming up) is left out, for both. Memory is the peak over time of
the sum over a run's processes of their proportional set size, taken every ten seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.flops import forward_flops, matmul_flops, separate_rows
from benchmarks.observe import Run, Step, observe, reached
from benchmarks.report import Flops, report
from benchmarks.shapes import SHAPES, SMOLLM2, Workload, model_directory
from benchmarks.shapes import WORKLOADS as SPEED_WORKLOADS

ROOT = Path(__file__).parents[1]
PRECISIONS = ("bf16", "autocast")
FLOAT32 = "float32"


WORKLOADS = {
    **SPEED_WORKLOADS,
    "chain_sum": Workload(SMOLLM2, prompts=8, completions=8, prompt_tokens=0, new_tokens=0),
}
# Times as fast as TRL's a step is asked to be; what has no bar is only reported.
BARS = {
    ("smollm2", "transformers"): 2.5,
    ("smollm2", "vllm"): 1.5,
    ("long_prompt", "transformers"): 2.5,
    ("gemma", "transformers"): 1.8,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--workload", choices=list(WORKLOADS), default="smollm2")
    shapes = ", ".join(SHAPES)
    add("--model", help=f"model directory, or a shape ({shapes}); none: the workload's")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--engine", choices=["transformers", "vllm"], default="transformers", help="raygrpo's")
    add("--prompts", type=int, help="prompts of a step; this and the next, none: the workload's")
    add("--completions", type=int, help="completions of a prompt")
    add("--prompt-tokens", type=int, help="tokens of a prompt (not chain_sum)")
    add("--new-tokens", type=int, help="tokens of a completion (not chain_sum)")
    add("--steps", type=int, help="optimizer updates of a run")
    add("--pairs", type=int, help="runs of each side, in alternating order")
    trl = [*PRECISIONS, "both", FLOAT32]
    add("--trl", choices=trl, default="both", help="TRL's precisions; float32: both sides'")
    add("--microbatch", type=int, default=8, help="completions that TRL trains at once")
    add("--threads", type=int, default=2, help="OMP_NUM_THREADS of TRL")
    add("--seed", type=int, default=0, help="seed of the first pair; each next one adds 1")
    add("--bar", type=float, help="times as fast as TRL; none: the workload's for the engine")
    add("--matmul-size", type=int, help="of the plain product; none: 2048, on a GPU 8192")
    add("--curves", action="store_true", help="run to the last step, and print the curves")
    add("--target", type=float, default=0.7, help="mean training accuracy to reach")
    add("--window", type=int, default=5, help="steps of that mean")
    add("--json", type=Path, help="write everything that was measured here")
    add("--work", type=Path, default=ROOT / "runs/vs_trl", help="directory of the runs")
    add("--timeout", type=float, default=3600.0, help="seconds of a run")
    options = parser.parse_args(arguments)
    workload = WORKLOADS[options.workload]
    options.speed = options.workload != "chain_sum"
    length = {"steps": 4, "pairs": 5} if options.speed else {"steps": 40, "pairs": 2}
    bar = {"bar": BARS.get((options.workload, options.engine))}
    for name, value in {**asdict(workload), **length, **bar}.items():
        if name != "model" and getattr(options, name) is None:
            setattr(options, name, value)
    options.dtype = "float32" if options.trl == FLOAT32 else "bfloat16"
    return options


def devices(options: argparse.Namespace) -> dict[str, Any]:
    """raygrpo's sections on one GPU, which its two sides share, or on none."""
    sections: dict[str, Any] = {
        "generators": {"engine": options.engine},
        "ray": {"address": "local"},
    }
    if options.device == "cuda":
        sections["generators"]["placement"] = "colocate"
        sections["ray"]["gpus"] = {"learner": 0.5, "generator": 0.5}
        if options.engine == "vllm":
            sections["generators"]["options"] = {"gpu_memory_utilization": 0.4}
    return sections


def speed_rows(model: str, num_prompts: int, prompt_tokens: int) -> list[dict[str, str]]:
    """Prompts of about ``prompt_tokens`` tokens, all different."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for number in range(num_prompts):
        words = " ".join(f"{(number * 7919 + i * 104729) % 9973} apples and" for i in range(999))
        ids = tokenizer(words, add_special_tokens=False)["input_ids"][:prompt_tokens]
        rows.append({"prompt": tokenizer.decode(ids)})
    return rows


def speed_config(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """raygrpo's configuration of the speed workload."""
    rows = speed_rows(options.model, options.prompts * options.steps, options.prompt_tokens)
    data = work / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    length = {"max_tokens": options.new_tokens, "filters": {"min_tokens": options.new_tokens}}
    return {
        "recipe": "trl024",
        "model": {"path": options.model, "dtype": options.dtype},
        "data": {"source": str(data), "max_prompt_length": 2 * options.prompt_tokens},
        "sampling": {"num_completions": options.completions, **length},
        "rewards": [{"func": f"{ROOT / 'benchmarks/vowels.py'}:vowels"}],
        "train": {"steps": options.steps, "groups_per_step": options.prompts},
        **devices(options),
    }


def chain_sum_config(options: argparse.Namespace) -> dict[str, Any]:
    """The example's configuration, with this benchmark's model and sizes."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples/chain_sum/config.yaml").read_text())
    config["model"] |= {"path": options.model, "dtype": options.dtype}
    config["eval"] = {}
    config["sampling"]["num_completions"] = options.completions
    config["train"] |= {"steps": options.steps, "groups_per_step": options.prompts}
    config["checkpoint"] = {}
    return config | devices(options)


def trl_spec(config: dict[str, Any], precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `trl_run.py` needs to do the same work as raygrpo's configuration."""
    source = ROOT / config["data"]["source"]
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    template = config["data"].get("template")
    if template:
        rows = [{**row, "prompt": template.format(**row)} for row in rows]
    sampling, optimizer = config["sampling"], config.get("optimizer", {})
    return {
        "model": options.model,
        "precision": precision,
        "dataset": rows,
        "num_prompts": options.prompts,
        "num_completions": sampling["num_completions"],
        "max_tokens": sampling["max_tokens"],
        "min_tokens": sampling.get("filters", {}).get("min_tokens", 0),
        "stop": next(iter(sampling.get("stop", [])), None),
        "reward": config["rewards"][0]["func"].rpartition(":")[2],
        "steps": options.steps,
        "lr": float(optimizer.get("lr", 1e-6)),
        # The recipe of the speed workload decays as TRL does; the example's rate is constant.
        "schedule": optimizer.get("schedule", "constant" if optimizer else "linear"),
        "microbatch": options.microbatch,
        "device": options.device,
    }


def run_raygrpo(config: dict[str, Any], seed: int, work: Path, options: argparse.Namespace) -> Run:
    """One run of the whole machinery."""
    path, directory = work / "config.yaml", work / "run"
    shutil.rmtree(directory, ignore_errors=True)
    path.write_text(yaml.safe_dump({**config, "run_dir": str(directory), "seed": seed}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for name in ("OMP_NUM_THREADS", "RAY_ADDRESS"):
        environment.pop(name, None)
    return observe(
        "raygrpo",
        [sys.executable, "-m", "raygrpo", "train", str(path)],
        environment=environment,
        rows=directory / "metrics.jsonl",
        parse=partial(raygrpo_step, num_completions=options.completions),
        log=work / "raygrpo.log",
        stop=stop_rule(options),
        timeout_s=options.timeout,
    )


def run_trl(
    config: dict[str, Any], precision: str, seed: int, work: Path, options: argparse.Namespace
) -> Run:
    """One run of TRL's trainer."""
    spec = trl_spec(config, precision, options)
    rows, path = work / f"trl-{precision}.jsonl", work / f"trl-{precision}.json"
    rows.unlink(missing_ok=True)
    spec |= {"rows": str(rows), "output": str(work / "trl"), "seed": seed}
    path.write_text(json.dumps(spec))
    threads = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    return observe(
        f"TRL {precision}",
        [sys.executable, str(ROOT / "benchmarks/trl_run.py"), str(path)],
        environment={**os.environ, **threads},
        rows=rows,
        parse=trl_step,
        log=work / f"trl-{precision}.log",
        stop=stop_rule(options),
        timeout_s=options.timeout,
    )


def stop_rule(options: argparse.Namespace) -> Any:
    """Whether the steps so far end a run before its last step."""
    if options.speed or options.curves:
        return lambda steps: False
    return lambda steps: reached(steps, options.target, options.window) is not None


def raygrpo_step(row: dict[str, Any], num_completions: int) -> Step | None:
    """A line of metrics.jsonl; None for one of an evaluation.

    Other: publishing and loading weights, and scoring a group. Generation is what is left: from
    weights loaded to the last group scored.
    """
    if "step_time" not in row:
        return None
    other = ("sync/publish_s", "sync/load_s", "timing/score_s")
    num_tokens = row["num_groups"] * num_completions * row["completions/mean_length"]
    return Step(
        number=int(row["step"]),
        reward=row["reward"],
        train_s=row["timing/update_s"],
        other_s=sum(row.get(name) or 0.0 for name in other),
        num_completion_tokens=round(num_tokens),
    )


def trl_step(row: dict[str, Any]) -> Step | None:
    """A line of `trl_run.py`; the update is what generating and preparing leave of the step."""
    if not row["step"]:
        return None
    return Step(
        number=row["step"],
        reward=row["reward"],
        generate_s=row["generate_s"],
        other_s=row["other_s"],
        num_completion_tokens=row["num_completion_tokens"],
    )


def make_runs(options: argparse.Namespace, work: Path) -> list[Run]:
    """All runs, in alternating order."""
    config = speed_config(options, work) if options.speed else chain_sum_config(options)
    precisions = PRECISIONS if options.trl == "both" else (options.trl,)
    runs: list[Run] = []
    for pair in range(options.pairs):
        seed = options.seed + pair
        sides: list[str] = [precisions[0], "raygrpo", *precisions[1:]]
        for side in sides if pair % 2 == 0 else reversed(sides):
            if side == "raygrpo":
                run = run_raygrpo(config, seed, work, options)
            else:
                run = run_trl(config, side, seed, work, options)
            runs.append(run)
            seconds = statistics.median(run.step_seconds[1:] or run.step_seconds)
            print(f"# {run.side}: {len(run.steps)} steps, median {seconds:.2f} s", flush=True)
    return runs


def measure_flops(options: argparse.Namespace) -> Flops | None:
    """The work of a step on rows of one completion each; None where lengths are not fixed."""
    if not options.speed:
        return None
    groups = [(options.prompt_tokens, [options.new_tokens] * options.completions)] * options.prompts
    forward = forward_flops(options.model, separate_rows(groups))
    plain = matmul_flops(options.dtype, options.device, options.threads, options.matmul_size)
    return Flops(forward=forward, plain=plain)


def main(arguments: list[str] | None = None) -> int:
    """Prints the page; 1 when the bar is missed."""
    # So that a run that is watched ends with this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse_arguments(arguments)
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options.model = model_directory(options.model, WORKLOADS[options.workload].model, work)
    runs = make_runs(options, work)
    page, holds = report(runs, options, measure_flops(options))
    print(page)
    if options.json:
        shown = {name: str(value) for name, value in vars(options).items()}
        measured = {"options": shown, "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(measured, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
