"""raygrpo against TRL: seconds a step, memory, and wall-clock to an accuracy, in alternating runs.

    python benchmarks/vs_trl.py                                    # speed, on SmolLM2-135M
    python benchmarks/vs_trl.py --workload chain_sum --curves      # half the wall-clock to 0.7?
    python benchmarks/vs_trl.py --engine vllm --new-tokens 64      # where vLLM is installed

Every run is a fresh process on the same model, prompts, group size, lengths and number of updates:
``python -m raygrpo train`` with Ray, generator, learner and scorers, and TRL's GRPOTrainer with
transformers' generation, once with all in bfloat16 and once with float32 weights and bfloat16
autocast; the bar holds against the faster. TRL gets OMP_NUM_THREADS=--threads, raygrpo its
defaults. TRL runs without activation checkpointing and in microbatches of --microbatch
completions, both faster than its defaults here.

speed: completions of exactly --new-tokens tokens on both sides, since no end may come before
(``min_new_tokens`` there, ``filters.min_tokens`` here), a reward that costs nothing, no refill.
chain_sum: examples/chain_sum/config.yaml as it stands but for its evaluations, which TRL does not
do; TRL with the same prompts, stop, group size, reward and constant rate. Runs end at the target,
unless --curves asks for both curves.

A step's seconds are taken by this program, from the arrival of the rows that both sides write when
a step has ended. The first step (warming up) is left out, for both. Memory is the peak over
time of the sum over a run's processes of their proportional set size, once a second.
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

from benchmarks.observe import Run, Step, observe, reached
from benchmarks.report import report

ROOT = Path(__file__).parents[1]
PRECISIONS = ("bf16", "autocast")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--workload", choices=["speed", "chain_sum"], default="speed")
    add("--model", default=str(ROOT / "weights/smollm2-135m"), help="model directory")
    add("--prompts", type=int, help="prompts of a step; none: 4, chain_sum 8")
    add("--engine", choices=["transformers", "vllm"], default="transformers", help="raygrpo's")
    add("--completions", type=int, default=8, help="completions of a prompt")
    add("--prompt-tokens", type=int, default=100, help="tokens of a prompt (speed)")
    add("--new-tokens", type=int, default=32, help="tokens of a completion (speed)")
    add("--steps", type=int, help="optimizer updates of a run; none: 4, chain_sum 40")
    add("--pairs", type=int, default=2, help="runs of each side")
    add("--trl", choices=[*PRECISIONS, "both"], default="both", help="TRL's precisions")
    add("--microbatch", type=int, default=8, help="completions that TRL trains at once")
    add("--threads", type=int, default=2, help="OMP_NUM_THREADS of TRL")
    add("--seed", type=int, default=0, help="seed of the first pair; each next one adds 1")
    add("--curves", action="store_true", help="run to the last step, and print the curves")
    add("--target", type=float, default=0.7, help="mean training accuracy to reach")
    add("--window", type=int, default=5, help="steps of that mean")
    add("--json", type=Path, help="write everything that was measured here")
    add("--work", type=Path, default=ROOT / "runs/vs_trl", help="directory of the runs")
    add("--timeout", type=float, default=3600.0, help="seconds of a run")
    options = parser.parse_args(arguments)
    sizes = {"speed": (4, 4), "chain_sum": (8, 40)}[options.workload]
    options.prompts = options.prompts or sizes[0]
    options.steps = options.steps or sizes[1]
    return options


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
        "model": {"path": options.model, "dtype": "bfloat16"},
        "data": {"source": str(data), "max_prompt_length": 2 * options.prompt_tokens},
        "sampling": {"num_completions": options.completions, **length},
        "rewards": [{"func": f"{ROOT / 'benchmarks/vowels.py'}:vowels"}],
        "train": {"steps": options.steps, "groups_per_step": options.prompts},
        "generators": {"engine": options.engine},
        "ray": {"address": "local"},
    }


def chain_sum_config(options: argparse.Namespace) -> dict[str, Any]:
    """The example's configuration, with this benchmark's model and sizes."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples/chain_sum/config.yaml").read_text())
    config["model"]["path"] = options.model
    config["eval"] = {}
    config["sampling"]["num_completions"] = options.completions
    config["train"] |= {"steps": options.steps, "groups_per_step": options.prompts}
    config["checkpoint"] = {}
    config["generators"] = {"engine": options.engine}
    config["ray"] = {"address": "local"}
    return config


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
    if options.workload == "speed" or options.curves:
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


def main(arguments: list[str] | None = None) -> int:
    # So that a run that is watched ends with this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse_arguments(arguments)
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options.model = str(Path(options.model).resolve())
    speed = options.workload == "speed"
    config = speed_config(options, work) if speed else chain_sum_config(options)
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
    print(report(runs, options))
    if options.json:
        shown = {name: str(value) for name, value in vars(options).items()}
        measured = {"options": shown, "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
