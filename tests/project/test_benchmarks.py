"""What benchmarks make of what they measure, and smoke runs of each at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import delta_bytes, lm_head, packing, rollout_throughput, update_vs_trl
from benchmarks.flops import Work, executed, forward_flops, separate_rows
from benchmarks.gpu_cases import microbatches, random_groups
from benchmarks.observe import NewRows, Run, Step, memory_bytes, observe, reached
from benchmarks.report import (
    Flops,
    report,
    seconds_to_target,
    speed_table,
    speed_verdict,
    target_verdict,
)
from benchmarks.vowels import vowels
from benchmarks.vs_trl import (
    parse_arguments,
    raygrpo_step,
    speed_rows,
    trl_spec,
    trl_step,
)
from raygrpo.types import PlannedSample
from tests.tiny import save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def run(
    side: str, seconds: list[float], rewards: list[float] | None = None, **of_step: float
) -> Run:
    """A run whose steps took so long; ready after 10 s, 64 tokens a step."""
    rewards = rewards or [0.0] * len(seconds)
    ends = [10 + sum(seconds[: i + 1]) for i in range(len(seconds))]
    steps = [
        Step(number=i + 1, reward=reward, other_s=0.5, num_completion_tokens=64, **of_step)  # type: ignore[arg-type]
        for i, reward in enumerate(rewards)
    ]
    return Run(side=side, steps=steps, ended_s=ends, ready_s=10.0, peak_bytes=3 * 2**30)


def test_the_first_step_is_left_out_and_the_rest_is_generation() -> None:
    ours = run("raygrpo", [9.0, 2.0, 4.0], train_s=1.0)
    assert ours.step_seconds == [9.0, 2.0, 4.0]
    assert ours.split() == [(7.5, 1.0, 0.5), (0.5, 1.0, 0.5), (2.5, 1.0, 0.5)]
    (_, _, line) = speed_table([ours])
    assert line == "| raygrpo | 3.00 (2.00 to 4.00) | 1.50 | 1.00 | 0.50 | 24 | 3.00 GiB |"
    # Of 10 FLOP/s: an update of 3 x 2 FLOP in 1 s, a step of 4 x 2 in 3 s.
    (_, _, line) = speed_table([ours], Flops(forward=2.0, plain=10.0))
    assert line.endswith("| 3.00 GiB | 0.60 | 0.27 |")


def test_the_bar_holds_against_the_faster_precision() -> None:
    peers = [run("TRL bf16", [9.0, 5.0]), run("TRL autocast", [9.0, 4.0])]
    text, holds = speed_verdict([*peers, run("raygrpo", [1.0, 1.6])], 2.5)
    assert "2.50 times as fast as one of TRL autocast" in text[0] and "holds" in text[1] and holds
    text, holds = speed_verdict([*peers, run("raygrpo", [1.0, 1.61])], 2.5)
    assert "FAILS" in text[1] and not holds
    assert speed_verdict([*peers, run("raygrpo", [1.0, 9.0])], None)[1]
    assert speed_verdict([run("raygrpo", [99.0, 3.0])], 2.5) == ([], True)


def test_the_bars_are_those_of_workload_and_engine() -> None:
    def bar(*arguments: str) -> float | None:
        return parse_arguments(list(arguments)).bar  # type: ignore[no-any-return]

    assert (bar(), bar("--engine", "vllm")) == (2.5, 1.5)
    assert bar("--workload", "long_prompt") == 2.5
    assert bar("--workload", "gemma") == 1.8
    assert bar("--workload", "gemma", "--engine", "vllm") is None
    options = parse_arguments([])
    assert (options.prompts, options.completions, options.pairs) == (4, 8, 5)
    assert (options.prompt_tokens, options.new_tokens) == (105, 64)
    long = parse_arguments(["--workload", "long_prompt"])
    assert (long.prompts, long.completions, long.prompt_tokens, long.new_tokens) == (2, 16, 256, 32)


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
    assert "holds" in target_verdict([ours, run("TRL bf16", [6.0] * 10, good)], 0.7, 5)[0][1]
    assert "FAILS" in target_verdict([ours, run("TRL bf16", [5.0] * 10, good)], 0.7, 5)[0][1]
    # One that never got there counts with all of its time.
    assert "holds" in target_verdict([ours, run("TRL bf16", [5.0] * 10, bad)], 0.7, 5)[0][1]
    failed = target_verdict([run("raygrpo", [1.0], [0.1]), run("TRL bf16", [5.0])], 0.7, 5)
    assert failed == (["raygrpo did not reach 0.7 in every run: the bar FAILS."], False)


def test_the_page_has_both_curves_when_asked() -> None:
    options = parse_arguments(["--workload", "chain_sum", "--curves", "--window", "2"])
    runs = [run("raygrpo", [2.0] * 4, [0.2, 0.4, 0.6, 0.9]), run("TRL bf16", [5.0] * 4)]
    page, _ = report(runs, options)
    assert "| 2 | 14 | 0.300 |" in page and "| 4 | 18 | 0.750 |" in page
    assert "| TRL bf16 | not in 4 steps (best 0.00) | |  |" in page


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
    assert rows() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert rows() == [{"a": 1}, {"a": 2}]
    assert rows() == []
    with path.open("a") as file:
        file.write(": 3}\n")
    assert rows() == [{"a": 3}]


CHILD = """
import json, subprocess, sys, time
block = bytearray(b"1") * 2**26
grandchild = "block = bytearray(b'1') * 2**26; import sys; sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", grandchild], stdin=subprocess.PIPE)
rows = open(sys.argv[1], "a", buffering=1)
rows.write(json.dumps({"step": 0}) + "\\n")
row = {"generate_s": 0.0, "other_s": 0.0, "num_completion_tokens": 1}
for step in range(1, 5):
    rows.write(json.dumps({"step": step, "reward": step / 4, **row}) + "\\n")
time.sleep(3600)
"""


def test_a_watched_run_ends_at_the_target_with_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB in the process and as much in its child, which ends with it."""
    monkeypatch.setattr("benchmarks.observe.MEMORY_EVERY_S", 0.0)
    found = observe(
        "child",
        [sys.executable, "-c", CHILD, str(tmp_path / "rows.jsonl")],
        environment=dict(os.environ),
        rows=tmp_path / "rows.jsonl",
        parse=trl_step,
        log=tmp_path / "log",
        stop=lambda steps: reached(steps, 0.8, 2) is not None,
        timeout_s=60.0,
    )
    assert [step.number for step in found.steps] == [1, 2, 3, 4]
    assert 0 < found.ready_s <= found.ended_s[0]
    assert found.peak_bytes > 2**26
    assert memory_bytes("no process has this mark", {}) == 0


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        observe(
            "broken",
            [sys.executable, "-c", "1 / 0"],
            environment=dict(os.environ),
            rows=tmp_path / "rows.jsonl",
            parse=trl_step,
            log=tmp_path / "log",
            stop=lambda steps: False,
            timeout_s=60.0,
        )


def test_the_work_is_the_same_on_both_sides(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    rows = speed_rows(str(model), 3, 40)
    lengths = [len(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in rows]
    assert lengths == [40] * 3 and len({row["prompt"] for row in rows}) == 3
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
    assert vowels(["aeb", ""]) == [2 / 3, 0.0]


QUICK = ["--prompt-tokens", "20", "--bar", "0.01", "--matmul-size", "128"]


@pytest.mark.slow
def test_both_sides_run_on_a_tiny_model(tmp_path: Path) -> None:
    """The real thing: TRL twice and raygrpo's whole machinery once."""
    model = save_tiny_model(tmp_path / "model")
    sizes = {"steps": 2, "pairs": 1, "prompts": 2, "completions": 4, "new-tokens": 8}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    paths = ["--model", str(model), "--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "benchmarks/vs_trl.py", *arguments, *paths, *QUICK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Bar, a step 0.01 times as fast: holds" in done.stdout
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [one["side"] for one in runs] == ["TRL bf16", "raygrpo", "TRL autocast"]
    for one in runs:
        # Equal work: every completion runs to its limit.
        assert [step["num_completion_tokens"] for step in one["steps"]] == [2 * 4 * 8] * 2
        assert one["peak_bytes"] > 2**27


def test_work_of_separate_rows_and_of_what_is_executed(tmp_path: Path) -> None:
    assert separate_rows([(3, [2, 4])]) == Work(5 + 7, 15 + 28, 6)
    groups = random_groups(60)
    for layout in ("plain", "shared", "packed"):
        (item,), _ = microbatches(groups, layout, budget=10_000)  # type: ignore[arg-type]
        done, (rows, width) = executed(item, layout), item.token_ids.shape
        head = sum(c.token_ids.size for group in groups.values() for c in group.completions)
        assert (done.tokens, done.head_tokens) == (rows * width, head)
        if layout == "plain":
            assert done.pairs == rows * width * (width + 1) // 2
        elif layout == "shared":
            assert done.pairs == rows * width**2
    # A layer of the tiny Llama: queries and output of 32 x 32, keys and values of 32 x 16, MLP.
    model = str(save_tiny_model(tmp_path))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    vocabulary = len(tiny_tokenizer())
    found = forward_flops(model, Work(10, 7, 3))
    assert found == 2 * (10 * 2 * layer + 2 * 2 * 32 * 7 + 3 * 32 * vocabulary)


def test_the_update_must_be_so_many_times_as_fast() -> None:
    def found(ours: float) -> update_vs_trl.Measured:
        taken = {"raygrpo": ours, "TRL bf16": 5.0, "TRL autocast": 6.0}
        return update_vs_trl.Measured(
            taken={name: [(9.0, 1.0), (s, 1.0), (s, 1.0)] for name, s in taken.items()},
            peaks=dict.fromkeys(taken, 1.5),
            work=None,
        )

    flops = {"of the task": 4e9, "executed": 2e9}
    lines, holds = update_vs_trl.report(found(2.0), flops, 4e9, 2.5)
    assert holds and "2.50 times as fast" in lines[-1]
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:3] == ["raygrpo", "2.00 (2.00 to 9.00)"]
    assert cells[4:7] == ["1.50", "2 (0.50)", "1 (0.25)"]
    assert not update_vs_trl.report(found(2.1), flops, 4e9, 2.5)[1]


def test_fillers_are_padding() -> None:
    def sample(index: int, filler: bool) -> PlannedSample:
        return PlannedSample(
            group_id=0, completion_index=index, prompt_length=10, completion_length=5,
            num_loss_tokens=5, advantage=0.0, loss_weight=1.0, filler=filler,
        )  # fmt: skip

    assert packing.real_tokens(((sample(0, False), sample(1, False)),)) == 20
    assert packing.real_tokens(((sample(0, True),),)) == 0


def test_bars_of_deltas_are_by_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert delta_bytes.verdict(1e-6, 0.01, 20.0)
    assert not delta_bytes.verdict(1e-6, 0.011, 21.0)
    assert not delta_bytes.verdict(1e-6, 0.005, 19.9)
    # What is asked at 1e-5 is the size alone.
    assert delta_bytes.verdict(1e-5, 0.02, 5.0)
    assert not delta_bytes.verdict(1e-5, 0.021, 50.0)
    assert delta_bytes.verdict(1e-3, 1.0, 1.0)
    assert capsys.readouterr().out.count("FAILS") == 3


def test_bars_of_engines(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"generate": [2.5], "direct": [1.0], "actor": [1.0 / 0.95]}
    assert rollout_throughput.verdict(times, "bfloat16")
    slower = {**times, "generate": [2.4]}
    assert not rollout_throughput.verdict(slower, "bfloat16")
    assert rollout_throughput.verdict(slower, "float32")
    assert not rollout_throughput.verdict({"direct": [1.0], "actor": [1.1]}, "bfloat16")
    assert "no bar" in capsys.readouterr().out


def test_bars_of_the_head_are_against_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    mib = 2**20
    found = {"full": (100 * mib, 2), "full, entropies": (150 * mib, 2), "full, lean": (90 * mib, 4)}
    chunked = {"fused": (4 * mib, 4), "recomputed": (4 * mib, 4)}
    assert lm_head.report_memory(found | chunked, 4)
    text = capsys.readouterr().out
    assert "full: 200 MiB (EXTRAPOLATED from 2 tokens)" in text and "of 'full, lean': holds" in text
    assert not lm_head.report_memory(found | chunked | {"fused": (5 * mib, 4)}, 4)


def test_packing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = packing.main(["--groups", "8", "--seeds", "1", "--ranks", "2", "--budget", "4096"])
    text = capsys.readouterr().out
    assert "| packed | 0.00% |" in text and ("FAILS" in text) == bool(code)


def test_lm_head_runs(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vocabulary", "512", "--time-tokens", "64", "--hidden-size", "16", "--threads", "1"]
    code = lm_head.main([*sizes, "--pairs", "1", "--matmul-size", "64", "--skip-memory"])
    text = capsys.readouterr().out
    assert all(f"{form}: " in text for form in lm_head.FORMS) and ("FAILS" in text) == bool(code)


def test_delta_bytes_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path)
    arguments = ["--model", str(model), "--steps", "3", "--threads", "1", "--lr", "1e-6"]
    code = delta_bytes.main(arguments)
    text = capsys.readouterr().out
    assert "1e-06 median from step 3" in text and ("FAILS" in text) == bool(code)


def smoke(script: str, *arguments: str) -> str:
    """What a benchmark prints at a tiny size; its exit code must follow from its bars alone."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == int("FAILS" in done.stdout), done.stderr[-3000:]
    return done.stdout


ON_A_CPU = ("--device", "cpu", "--quick", "--threads", "1")


def test_gpu_check_runs_on_a_cpu() -> None:
    """But for its learners, see below."""
    text = smoke("gpu_check", *ON_A_CPU, "--only", "head", "rows", "engine")
    assert "| Ray was not imported | True | True | ok |" in text
    assert "| rows gemma3, packed: gradient |" in text and "0 failed" in text


@pytest.mark.slow
def test_gpu_check_of_learners_runs_on_a_cpu() -> None:
    text = smoke("gpu_check", *ON_A_CPU, "--only", "learner")
    assert "| DeepSpeed float32: without Ray | True | True | ok |" in text and "0 failed" in text


@pytest.mark.slow
def test_update_vs_trl_runs() -> None:
    quick = ["--pairs", "1", "--threads", "1", "--matmul-size", "128", "--workload", "gemma"]
    text = smoke("update_vs_trl", "--model", "tiny", *quick)
    assert "the bar of 1.5" in text and "| TRL autocast |" in text


@pytest.mark.slow
def test_lm_head_takes_memory() -> None:
    sizes = ["--vocabulary", "4096", "--tokens", "512", "--hidden-size", "16", "--skip-time"]
    assert "memory at most 5% of 'full, lean'" in smoke("lm_head", *sizes)


@pytest.mark.slow
def test_async_overlap_runs() -> None:
    text = smoke("async_overlap", "--seconds", "0.4", "--steps", "2", "--runs", "1")
    assert "| asynchronous (2) |" in text


@pytest.mark.slow
def test_scaling_runs() -> None:
    quick = ["--group-s", "0.5", "--steps", "2", "--runs", "1", "--scorers", "1"]
    text = smoke("scaling", "--generators", "2", *quick)
    row = next(line for line in text.splitlines() if line.startswith("| 2 |"))
    machine, own = (float(cell.strip(" %")) for cell in row.split("|")[5:7])
    # The machine counts in ticks of 10 ms, over a second or two.
    assert 0 < machine < 110 and 0 < own < 110


@pytest.mark.slow
def test_weight_sync_runs(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    quick = ["--generators", "1", "--runs", "1", "--new-tokens", "100"]
    text = smoke("weight_sync", "--model", str(model), *quick)
    assert "at most 8 copies, stall below 10%" in text


@pytest.mark.slow
def test_rollout_throughput_runs(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    sizes = ["--prompts", "2", "--completions", "2", "--prompt-length", "8", "--new-tokens", "8"]
    text = smoke("rollout_throughput", "--model", str(model), "--runs", "2", *sizes)
    assert "actor / direct in tokens/s" in text and "direct / generate in tokens/s" in text
