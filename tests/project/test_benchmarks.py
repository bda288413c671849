"""The arithmetic that decides a benchmark's bar, and a smoke run of each benchmark."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import delta_bytes, lm_head, packing, rollout_throughput, update_vs_trl
from benchmarks.flops import Work, executed, forward_flops, separate_rows
from benchmarks.gpu_cases import microbatches, random_groups
from benchmarks.observe import NewRows, Run, Step, observe, reached
from benchmarks.report import seconds_to_target, speed_verdict, target_verdict
from benchmarks.vs_trl import parse_arguments, raygrpo_step, trl_spec, trl_step
from tests.tiny import save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def run(side: str, seconds: list[float], rewards: list[float] | None = None) -> Run:
    """A run whose steps took so long; ready after 10 s, 64 tokens a step."""
    rewards = rewards or [0.0] * len(seconds)
    ends = [10 + sum(seconds[: i + 1]) for i in range(len(seconds))]
    steps = [
        Step(number=i + 1, reward=reward, other_s=0.5, num_completion_tokens=64, train_s=1.0)
        for i, reward in enumerate(rewards)
    ]
    return Run(side=side, steps=steps, ended_s=ends, ready_s=10.0, peak_bytes=3 * 2**30)


def test_a_bar_holds_against_the_faster_precision() -> None:
    """The first step, which warms up, is left out."""
    peers = [run("TRL bf16", [9.0, 5.0]), run("TRL autocast", [9.0, 4.0])]
    assert speed_verdict([*peers, run("raygrpo", [1.0, 1.6])], 2.5)[1]
    assert not speed_verdict([*peers, run("raygrpo", [1.0, 1.61])], 2.5)[1]
    assert speed_verdict([*peers, run("raygrpo", [1.0, 9.0])], None)[1]


def test_generation_is_what_the_rest_of_a_step_leaves() -> None:
    ours = run("raygrpo", [9.0, 2.0, 4.0])
    assert ours.split() == [(7.5, 1.0, 0.5), (0.5, 1.0, 0.5), (2.5, 1.0, 0.5)]


def test_the_target_is_a_mean_over_a_window() -> None:
    rewards = [0.9, 0.1, 0.7, 0.8, 0.6, 0.9]
    steps = run("raygrpo", [1.0] * 6, rewards).steps
    assert reached(steps, 0.7, 3) == 4
    assert reached(steps, 0.8, 3) is None
    assert reached(steps[:2], 0.0, 3) is None
    assert seconds_to_target(run("raygrpo", [2.0] * 6, rewards), 0.7, 3) == (5, 20.0, 10.0)


def test_half_the_wall_clock_counts_from_the_process_start() -> None:
    good, bad = [0.7] * 10, [0.1] * 10
    ours = run("raygrpo", [2.0] * 10, good)  # at 10 + 5 * 2 s

    def holds(*runs: Run) -> bool:
        return target_verdict(list(runs), 0.7, 5)[1]

    assert holds(ours, run("TRL bf16", [6.0] * 10, good))
    assert not holds(ours, run("TRL bf16", [5.0] * 10, good))
    # A run that never got there counts with all of its time.
    assert holds(ours, run("TRL bf16", [5.0] * 10, bad))
    assert not holds(run("raygrpo", [1.0], [0.1]), run("TRL bf16", [5.0]))


def test_rows_of_both_sides_become_steps() -> None:
    row = {"step": 3, "reward": 0.5, "num_groups": 4.0, "completions/mean_length": 2.5}
    row |= {"step_time": 9.0, "timing/update_s": 2.0, "sync/load_s": 0.25}
    ours = raygrpo_step({**row, "sync/publish_s": None}, num_completions=8)
    assert ours == Step(number=3, reward=0.5, other_s=0.25, num_completion_tokens=80, train_s=2.0)
    assert raygrpo_step({"step": 0, "eval/reward": 0.1}, num_completions=8) is None
    theirs = {"step": 1, "reward": 1.0, "generate_s": 3.0, "other_s": 1.0}
    assert trl_step({**theirs, "num_completion_tokens": 7}) == Step(
        number=1, reward=1.0, other_s=1.0, num_completion_tokens=7, generate_s=3.0
    )
    assert trl_step({"step": 0}) is None


def test_new_rows_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = NewRows(path)
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert rows() == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write(": 3}\n")
    assert rows() == [{"a": 3}]


CHILD = """
import json, sys, time
rows = open(sys.argv[1], "a", buffering=1)
row = {"generate_s": 0.0, "other_s": 0.0, "num_completion_tokens": 1}
for step in range(1, 5):
    rows.write(json.dumps({"step": step, "reward": step / 4, **row}) + "\\n")
time.sleep(3600)
"""


def watched(tmp_path: Path, code: str) -> Run:
    rows = tmp_path / "rows.jsonl"
    rows.unlink(missing_ok=True)
    return observe(
        "child",
        [sys.executable, "-c", code, str(rows)],
        environment=dict(os.environ),
        rows=rows,
        parse=trl_step,
        log=tmp_path / "log",
        stop=lambda steps: reached(steps, 0.8, 2) is not None,
        timeout_s=60.0,
    )


def test_a_watched_run_ends_at_the_target(tmp_path: Path) -> None:
    assert [step.number for step in watched(tmp_path, CHILD).steps] == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        watched(tmp_path, "1 / 0")


def test_trl_gets_the_same_work(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    config = {
        "data": {"source": str(data), "template": "Q {question} A"},
        "sampling": {"num_completions": 8, "max_tokens": 4, "stop": ["\n"]},
        "rewards": [{"func": "exact"}],
        "optimizer": {"lr": "1e-5"},
    }
    spec = trl_spec(config, "bf16", parse_arguments(["--steps", "7"]))
    assert spec["dataset"] == [{"question": "1+1", "answer": "2", "prompt": "Q 1+1 A"}]
    assert (spec["stop"], spec["max_tokens"], spec["min_tokens"]) == ("\n", 4, 0)
    assert (spec["lr"], spec["schedule"], spec["steps"]) == (1e-5, "constant", 7)


def test_work_is_counted_in_tokens_pairs_and_flops(tmp_path: Path) -> None:
    assert separate_rows([(3, [2, 4])]) == Work(5 + 7, 15 + 28, 6)
    (item,), _ = microbatches(random_groups(60), "shared", budget=10_000)
    rows, width = item.token_ids.shape
    done = executed(item, "shared")
    assert (done.tokens, done.pairs) == (rows * width, rows * width**2)
    # A layer of the tiny Llama: queries and output of 32 x 32, keys and values of 32 x 16, MLP.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    found = forward_flops(str(save_tiny_model(tmp_path)), Work(10, 7, 3))
    assert found == 2 * (10 * 2 * layer + 2 * 2 * 32 * 7 + 3 * 32 * len(tiny_tokenizer()))


@pytest.mark.parametrize(("ours_s", "holds"), [(2.0, True), (2.1, False)])
def test_the_updates_bar(ours_s: float, holds: bool) -> None:
    taken = {"raygrpo": ours_s, "TRL bf16": 5.0, "TRL autocast": 6.0}
    found = update_vs_trl.Measured(
        taken={name: [(9.0, 1.0), (s, 1.0), (s, 1.0)] for name, s in taken.items()},
        peaks=dict.fromkeys(taken, 1.5),
        work=None,
    )
    assert update_vs_trl.report(found, {"of the task": 4e9, "executed": 2e9}, 4e9, 2.5)[1] == holds


def test_bars_of_deltas_and_engines() -> None:
    assert delta_bytes.verdict(1e-6, 0.01, 20.0)
    assert not delta_bytes.verdict(1e-6, 0.011, 21.0)
    assert not delta_bytes.verdict(1e-6, 0.005, 19.9)
    # At 1e-5 the bar is of the size alone.
    assert delta_bytes.verdict(1e-5, 0.02, 5.0) and not delta_bytes.verdict(1e-5, 0.021, 50.0)
    times = {"generate": [2.5], "direct": [1.0], "actor": [1.0 / 0.95]}
    slower = {**times, "generate": [2.4]}
    assert rollout_throughput.verdict(times, "bfloat16")
    assert not rollout_throughput.verdict(slower, "bfloat16")
    assert rollout_throughput.verdict(slower, "float32")


def test_quick_benchmarks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, at tiny sizes; an exit code says whether a bar fails."""
    head = ["--vocabulary", "512", "--time-tokens", "64", "--hidden-size", "16", "--threads", "1"]
    head += ["--pairs", "1", "--matmul-size", "64", "--skip-memory"]
    rows = ["--groups", "8", "--seeds", "1", "--ranks", "2", "--budget", "4096"]
    delta = ["--model", str(save_tiny_model(tmp_path)), "--steps", "3", "--threads", "1"]
    for main, arguments in (
        (packing.main, rows),
        (lm_head.main, head),
        (delta_bytes.main, [*delta, "--lr", "1e-6"]),
    ):
        code = main(arguments)
        assert ("FAILS" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize("name", ["async_overlap", "scaling", "weight_sync", "gpu_check"])
def test_other_benchmarks_can_be_imported(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


SLOW = {
    "gpu_check": "--device cpu --quick --threads 1",
    "update_vs_trl": "--model tiny --pairs 1 --threads 1 --matmul-size 128 --workload gemma",
    "lm_head": "--vocabulary 4096 --tokens 512 --hidden-size 16 --skip-time",
    "async_overlap": "--seconds 0.4 --steps 2 --runs 1",
    "scaling": "--generators 2 --group-s 0.5 --steps 2 --runs 1 --scorers 1",
    "weight_sync": "--model {model} --generators 1 --runs 1 --new-tokens 100",
    "rollout_throughput": "--model {model} --runs 2 --prompts 2 --completions 2 --prompt-length 8 "
    "--new-tokens 8",
    "vs_trl": "--model {model} --work {work} --json {work}/out.json --steps 2 --pairs 1 "
    "--prompts 2 --completions 4 --new-tokens 8 --prompt-tokens 20 --bar 0.01 --matmul-size 128",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    """As a user starts it, at a tiny size; the exit code says whether a bar fails."""
    model = save_tiny_model(tmp_path / "model")
    arguments = SLOW[name].format(model=model, work=tmp_path).split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == int("FAILS" in done.stdout), done.stderr[-3000:]
    if name == "vs_trl":
        # Equal work: every completion of each side runs to its limit.
        for one in json.loads((tmp_path / "out.json").read_text())["runs"]:
            assert [step["num_completion_tokens"] for step in one["steps"]] == [2 * 4 * 8] * 2
