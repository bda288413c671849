"""What benchmarks/vs_trl.py makes of the runs that it watches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.observe import NewRows, Run, Step, memory_bytes, observe, reached
from benchmarks.report import (
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


def test_the_bar_holds_against_the_faster_precision() -> None:
    peers = [run("TRL bf16", [9.0, 5.0]), run("TRL autocast", [9.0, 4.0])]
    slower, ratio = run("raygrpo", [1.0, 4.4]), run("raygrpo", [99.0, 3.0])
    assert "FAILS" in speed_verdict([*peers, slower])[1]
    text = speed_verdict([*peers, ratio])
    assert "0.75 of TRL autocast's" in text[0] and "holds" in text[1]
    assert speed_verdict([ratio]) == []


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
    assert "holds" in target_verdict([ours, run("TRL bf16", [6.0] * 10, good)], 0.7, 5)[1]
    assert "FAILS" in target_verdict([ours, run("TRL bf16", [5.0] * 10, good)], 0.7, 5)[1]
    # One that never got there counts with all of its time.
    assert "holds" in target_verdict([ours, run("TRL bf16", [5.0] * 10, bad)], 0.7, 5)[1]
    failed = target_verdict([run("raygrpo", [1.0], [0.1]), run("TRL bf16", [5.0])], 0.7, 5)
    assert failed == ["raygrpo did not reach 0.7 in every run: the bar FAILS."]


def test_the_page_has_both_curves_when_asked() -> None:
    options = parse_arguments(["--workload", "chain_sum", "--curves", "--window", "2"])
    runs = [run("raygrpo", [2.0] * 4, [0.2, 0.4, 0.6, 0.9]), run("TRL bf16", [5.0] * 4)]
    page = report(runs, options)
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


@pytest.mark.slow
def test_both_sides_run_on_a_tiny_model(tmp_path: Path) -> None:
    """The real thing: TRL twice and raygrpo's whole machinery once."""
    model = save_tiny_model(tmp_path / "model")
    sizes = {"steps": 2, "pairs": 1, "prompts": 2, "completions": 4, "new-tokens": 8}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    paths = ["--model", str(model), "--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "benchmarks/vs_trl.py", *arguments, *paths, "--prompt-tokens", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Bar, no slower than TRL a step" in done.stdout
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [one["side"] for one in runs] == ["TRL bf16", "raygrpo", "TRL autocast"]
    for one in runs:
        # Equal work: every completion runs to its limit.
        assert [step["num_completion_tokens"] for step in one["steps"]] == [2 * 4 * 8] * 2
        assert one["peak_bytes"] > 2**27
