"""Metrics by their definitions, and what a run leaves on disk, on screen and at wandb."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.checks.checked import check
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking import wandb_logger
from raygrpo.tracking.console import Console
from raygrpo.tracking.curve import draw_curve
from raygrpo.tracking.files import EventsFile, MetricsFile, read_metrics
from raygrpo.tracking.metrics import StepFacts, reward_metrics, stat_metrics, step_metrics
from raygrpo.tracking.tensorboard import TensorBoardWriter, check_tensorboard
from raygrpo.tracking.tracker import Tracker
from raygrpo.tracking.wandb_logger import WandbLogger, redacted
from raygrpo.types import GroupSummary, Score, Stat, Version
from tests import builders
from tests.builders import summary


def group(
    values: list[float | None],
    *,
    group_id: int = 0,
    lengths: list[int] | None = None,
    finishes: list[Any] | None = None,
    errors: list[str | None] | None = None,
    version: int = 0,
    metrics: dict[str, tuple[float, ...]] | None = None,
) -> GroupSummary:
    size = len(values)
    lengths = lengths or [4] * size
    errors = errors or [None] * size
    return GroupSummary(
        stream="train",
        group_id=group_id,
        attempt=0,
        prompt_id=f"row-{group_id}",
        prompt_length=5,
        lengths=tuple(lengths),
        num_loss_tokens=tuple(lengths),
        finishes=tuple(finishes or ["stop"] * size),
        oldest=(Version(1, version),) * size,
        newest=(Version(1, version),) * size,
        scores=tuple(
            Score(value=value, parts={"exact": value}, error=error)
            for value, error in zip(values, errors, strict=True)
        ),
        metrics=metrics or {},
        generate_s=0.5,
        score_s=0.25,
    )


def facts(finished: list[GroupSummary], trained: list[GroupSummary], **keys: Any) -> StepFacts:
    defaults: dict[str, Any] = {
        "step": 3, "stats": {}, "epoch": 0.5, "num_tokens": 100, "step_s": 2.0, "update_s": 0.5,
        "num_teaching": 0,
    }  # fmt: skip
    return StepFacts(finished=finished, trained=trained, **{**defaults, **keys})


def run_config(tmp_path: Path, **tracking: Any) -> RunConfig:
    return builders.config(
        run_dir=str(tmp_path / "run"),
        rewards=[{"func": "exact", "params": {"api_key": "hunter2", "max_tokens": 5}}],
        train={"steps": 3},
        tracking=tracking,
    )


def events_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


# Metrics.


def test_rewards_are_trls_over_all_finished_groups() -> None:
    mixed, alike, other = [1.0, 0.0, 0.0, 1.0], [1.0] * 4, [0.0, 0.0, 0.0, 2.0]
    groups = [group(mixed), group(alike, group_id=1), group(other, group_id=2)]
    metrics = step_metrics(facts(groups, [groups[0], groups[2]], num_teaching=2))
    everything = np.array([mixed, alike, other])
    assert metrics["reward"] == pytest.approx(everything.mean())
    assert metrics["reward_std"] == pytest.approx(everything.std(ddof=1))
    assert metrics["group_reward_std"] == pytest.approx(everything.std(axis=1, ddof=1).mean())
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["frac_no_signal"] == pytest.approx(1 / 3)
    assert metrics["rewards/exact/mean"] == pytest.approx(everything.mean())
    assert metrics["rewards/exact/std"] == pytest.approx(everything.std(ddof=1))
    trained = everything[[0, 2]]
    assert metrics["trained/reward"] == pytest.approx(trained.mean())
    assert metrics["trained/reward_std"] == pytest.approx(trained.std(ddof=1))
    deviations = trained.std(axis=1, ddof=1)
    assert metrics["trained/group_reward_std"] == pytest.approx(deviations.mean())
    assert metrics["trained/frac_reward_zero_std"] == 0.0
    assert (metrics["num_groups"], metrics["trained/num_groups"]) == (3, 2)
    assert metrics["epoch"] == 0.5
    assert metrics["num_tokens"] == 100
    assert metrics["step_time"] == 2.0
    assert metrics["timing/tokens_per_s"] == 3 * 4 * 4 / 2.0


def test_none_and_errored_scores_are_in_no_mean() -> None:
    scored = group([1.0, None, 0.0, None], errors=[None, "boom", None, None])
    lonely = group([1.0, None], group_id=1)
    metrics = reward_metrics([scored, lonely])
    assert metrics["reward"] == pytest.approx(2 / 3)
    assert metrics["reward/error_frac"] == pytest.approx(1 / 6)
    assert metrics["reward_std"] == pytest.approx(np.std([1.0, 0.0, 1.0], ddof=1))
    assert metrics["group_reward_std"] == pytest.approx(math.sqrt(0.5))  # the lonely one has none
    assert metrics["frac_reward_zero_std"] == 0.0
    alike = group([2.0, 2.0, None, None], group_id=2)
    assert reward_metrics([scored, lonely, alike])["frac_reward_zero_std"] == pytest.approx(1 / 3)
    # A part that was computed before another reward failed still belongs to an errored score.
    half = Score(value=None, parts={"exact": 9.0}, error="boom")
    fine = Score(value=1.0, parts={"exact": 1.0})
    both = group([1.0, 1.0])
    mixed = GroupSummary(**{f: getattr(both, f) for f in both.__slots__} | {"scores": (half, fine)})
    assert reward_metrics([mixed])["rewards/exact/mean"] == 1.0


def test_a_rewards_metric_replaces_none_of_ours(tmp_path: Path) -> None:
    group = replace(summary(0, [1.0, 0.0]), metrics={"reward": (9.0,), "step": (7.0,), "x": (2.0,)})
    metrics = reward_metrics([group])
    assert (metrics["reward"], metrics["x"]) == (0.5, 2.0)
    with MetricsFile(tmp_path / "m.jsonl", resume_step=None) as file:
        file.log(3, metrics)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [3]


def test_no_metric_stands_for_nothing() -> None:
    silent = group([None, None])
    metrics = step_metrics(facts([silent], []))
    assert "reward" not in metrics
    assert "reward_std" not in metrics
    assert not any(name.startswith("trained/reward") for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(math.isfinite(v) for v in step_metrics(facts([], [])).values())


def test_lengths_tell_terminated_from_clipped() -> None:
    one = group([0.0] * 4, lengths=[2, 4, 6, 8], finishes=["stop", "length", "stop", "length"])
    metrics = step_metrics(facts([one], [one]))
    assert metrics["completions/mean_length"] == 5
    assert metrics["completions/min_length"] == 2
    assert metrics["completions/max_length"] == 8
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["completions/mean_terminated_length"] == 4
    assert metrics["completions/min_terminated_length"] == 2
    assert metrics["completions/max_terminated_length"] == 6
    endless = group([0.0] * 2, finishes=["length", "length"])
    metrics = step_metrics(facts([endless], []))
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_terminated_length"] == 0


def test_staleness_counts_versions_behind_the_step() -> None:
    fresh, stale = group([0.0, 1.0], version=3), group([0.0, 1.0], group_id=1, version=1)
    metrics = step_metrics(facts([fresh, stale], [fresh, stale], step=3))
    assert metrics["staleness/mean"] == 1.0
    assert metrics["staleness/max"] == 2.0


@given(st.lists(st.floats(0.05, 20.0), min_size=1, max_size=30))
def test_learner_statistics_and_effective_sample_size(weights: list[float]) -> None:
    w = np.array(weights)

    def stat(values: Any) -> Stat:
        return Stat(sum=values.sum(), count=len(values), min=values.min(), max=values.max())

    metrics = stat_metrics(
        {
            "entropy": stat(w),
            "kl": Stat(sum=0.0, count=0.0, min=math.inf, max=-math.inf),
            "clip_ratio/low_min": stat(w),
            "clip_ratio/high_max": stat(w),
            "sampling/importance_sampling_ratio": stat(w.clip(max=2.0)),
            "sampling/token_ratio": stat(w),
            "sampling/token_ratio_squared": stat(w**2),
        }
    )
    assert metrics["entropy"] == pytest.approx(w.mean())
    assert "kl" not in metrics
    capped = w.clip(max=2.0)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(capped.mean())
    assert metrics["sampling/importance_sampling_ratio/min"] == capped.min()
    assert metrics["sampling/importance_sampling_ratio/max"] == capped.max()
    assert (metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"]) == (w.min(), w.max())
    assert not any("token_ratio" in name for name in metrics)
    assert metrics["ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()))
    assert metrics["ess"] <= 1 + 1e-12


def test_values_that_rewards_report_are_averaged() -> None:
    groups = [
        group([0.0, 1.0], metrics={"depth": (1.0, 2.0)}),
        group([0.0, 1.0], group_id=1, metrics={"depth": (6.0, math.nan)}),
    ]
    assert reward_metrics(groups)["depth"] == 3.0


# Files.


def test_metrics_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=None) as file:
        for step in range(5):
            file.log(step, {"reward": step / 10})
    with MetricsFile(path, resume_step=2) as file:
        file.log(3, {"reward": 9.0})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["reward"] for row in rows] == [0.0, 0.1, 0.2, 9.0]
    with MetricsFile(path, resume_step=None):
        pass
    assert read_metrics(path) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=None) as file:
        file.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 0.5}


@pytest.mark.parametrize("tear", [1, 7, 20])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, tear: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=None) as file:
        file.log(1, {"reward": 0.25})
        file.log(2, {"reward": 0.50})
    path.write_bytes(path.read_bytes()[:-tear])
    with MetricsFile(path, resume_step=5) as file:
        file.log(2, {"reward": 0.75})
    assert [row["reward"] for row in read_metrics(path)] == [0.25, 0.75]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(StorageError, match="line 2"):
        MetricsFile(path, resume_step=3)


def test_events_are_appended_even_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventsFile(path) as file:
        file.log("started", {"pids": [1, 2], "where": tmp_path})
    with path.open("a") as torn:
        torn.write('{"time": 1, "ki')
    with EventsFile(path) as file:
        file.log("resumed", {"step": 4, "value": math.nan})
    first, _, last = path.read_text().splitlines()
    assert json.loads(first)["kind"] == "started"
    assert json.loads(first)["where"] == str(tmp_path)
    assert json.loads(last)["kind"] == "resumed"
    assert json.loads(last)["value"] is None
    assert json.loads(first)["time"] <= json.loads(last)["time"]


def test_logged_steps_survive_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = f"""
        import pathlib, sys
        from raygrpo.tracking.files import MetricsFile
        file = MetricsFile(pathlib.Path({str(path)!r}), resume_step=None)
        for step in range(1, 1_000_000):
            file.log(step, {{"reward": step / 7}})
            print(step, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        told = [int(process.stdout.readline()) for _ in range(20)][-1]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told


# Console and curve.


def test_one_plain_line_a_step_off_a_terminal() -> None:
    out = io.StringIO()
    console = Console(12, file=out)
    console.log_step(0, {"eval/reward": 0.1})
    console.log_step(7, {"reward": 0.5, "loss": math.nan, "step_time": 1.234, "other": 1.0})
    console.event("checkpoint", {"step": 7})
    console.event("worker_replaced", {"worker": "generator-0", "error": "dead [red]\nsecond line"})
    console.close()
    assert out.getvalue().splitlines() == [
        "step  0/12  eval 0.100",
        "step  7/12  reward 0.500  s/step 1.23",
        "worker replaced: worker generator-0, error dead [red]",
    ]


def test_a_live_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    console = Console(4, file=out)
    console.log_step(1, {"eval/reward": 0.125})
    console.log_step(3, {"reward": 0.75})
    console.close()
    assert "3/4" in out.getvalue()
    assert "reward 0.750  eval 0.125" in out.getvalue()


def test_the_curve_is_a_picture_of_the_rewards(tmp_path: Path) -> None:
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curve.png"
    with MetricsFile(metrics, resume_step=None) as file:
        assert not draw_curve(metrics, picture)
        assert not picture.exists()
        for step in range(6):
            row = {"reward": step / 6} if step else {}
            file.log(step, row | ({"eval/reward": step / 5} if step % 5 == 0 else {}))
    assert draw_curve(metrics, picture)
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    height, width, _ = pixels.shape
    assert (width, height) == (840, 480)
    blue, orange = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)  # matplotlib's first two colours
    for colour in (blue, orange):
        off = np.abs(pixels[:, :, :3] - np.array(colour) / 255).max(axis=-1)
        assert (off < 0.02).sum() > 50
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


# The tracker and wandb.


def test_the_tracker_records_everything_and_resumes(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run_dir = RunDir.claim(config)
    tracker = Tracker(run_dir.root, config, file=io.StringIO())
    for step in (1, 2):
        tracker.log_step(step, {"reward": step / 4})
    tracker.event("worker_replaced", worker="generator-0")
    assert tracker.last_metrics == {"reward": 0.5}
    tracker.close()
    tracker.close()
    assert (run_dir.root / "curve.png").is_file()
    again = Tracker(run_dir.root, config, resume_step=1, file=io.StringIO())
    again.log_step(2, {"reward": 0.75})
    again.close()
    assert [row["reward"] for row in read_metrics(run_dir.metrics_path)] == [0.25, 0.75]
    assert [event["kind"] for event in events_of(run_dir.root)] == ["worker_replaced"]
    run_dir.release()


def wandb_records(path: Path) -> list[bytes]:
    """The records of a .wandb file: a 7 byte header, then LevelDB's log format.

    Blocks of 32 KiB hold fragments: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3:
    middle, 4: last), data; a rest of a block under 7 bytes is padding.
    """
    data, at = path.read_bytes(), 7
    assert data.startswith(b":W&B")
    records: list[bytes] = []
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        fragment = data[at + 7 : at + 7 + length]
        if kind in (1, 2):
            records.append(fragment)
        else:
            records[-1] += fragment
        at += 7 + length
    return records


def read_offline(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """(history rows, config, run id) of an offline wandb run, from its binary log."""
    from wandb.proto import wandb_internal_pb2 as pb

    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    run_id = ""
    for data in wandb_records(next(directory.glob("*.wandb"))):
        record = pb.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        if record.HasField("run"):
            run_id = record.run.run_id
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return rows, config, run_id


def test_wandb_offline_continues_one_run_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sentinel" + "0" * 32)
    monkeypatch.setenv("WANDB_NAME", "a-name")
    config = run_config(tmp_path, wandb="offline")
    run_dir = RunDir.claim(config)
    ids = []
    for resume_step, steps in ((None, (1, 2)), (1, (2, 3))):
        tracker = Tracker(run_dir.root, config, resume_step=resume_step, file=io.StringIO())
        for step in steps:
            tracker.log_step(step, {"reward": step / 4, "completions/mean_length": 2.0})
        tracker.close()
        ids.append(run_dir.facts["wandb_id"])
    run_dir.release()
    assert ids[0] == ids[1]
    directories = sorted((run_dir.root / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    read = [read_offline(directory) for directory in directories]
    assert {run_id for _, _, run_id in read} == {ids[0]}
    history = [[(row["step"], row["reward"]) for row in rows] for rows, _, _ in read]
    assert sorted(history) == [[(1, 0.25), (2, 0.5)], [(2, 0.5), (3, 0.75)]]
    assert read[0][1]["train"]["steps"] == 3
    assert not [e for e in events_of(run_dir.root) if e["kind"] == "wandb_failed"]
    stored = b"".join(p.read_bytes() for p in run_dir.root.rglob("wandb/**/*") if p.is_file())
    assert b"max_tokens" in stored
    assert b"hunter2" not in stored
    assert b"sentinel" not in stored


def test_wandb_that_cannot_start_is_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygrpo.tracking.wandb_logger._INIT_TIMEOUT_S", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    config = run_config(tmp_path, wandb="online")
    run_dir = RunDir.claim(config)
    tracker = Tracker(run_dir.root, config, file=io.StringIO())
    tracker.log_step(1, {"reward": 0.5})
    tracker.close()
    run_dir.release()
    failed = [event for event in events_of(run_dir.root) if event["kind"] == "wandb_failed"]
    assert len(failed) == 1
    assert failed[0]["action"] == "init"
    assert [row["step"] for row in read_metrics(run_dir.metrics_path)] == [1]


def test_wandb_without_credentials_records_offline(tmp_path: Path) -> None:
    # In a process of its own: wandb keeps credentials that it has once seen.
    code = f"""
import io
from raygrpo.config.file import load_config
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.tensorboard import TensorBoardWriter, check_tensorboard
from raygrpo.tracking.tracker import Tracker
config = load_config({{
    "run_dir": {str(tmp_path / "run")!r}, "model": {{"path": "m"}}, "data": {{"source": "d"}},
    "tracking": {{"wandb": "online"}},
}})
run_dir = RunDir.claim(config)
tracker = Tracker(run_dir.root, config, file=io.StringIO())
tracker.log_step(1, {{"reward": 0.5}})
tracker.close()
"""
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"}
    environment["NETRC"] = str(tmp_path / "no-netrc")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    root = tmp_path / "run"
    (event,) = [event for event in events_of(root) if event["kind"].startswith("wandb")]
    assert event["kind"] == "wandb_offline"
    assert "wandb login" in event["reason"]
    assert list((root / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_that_dies_while_logging_is_one_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = wandb_logger._start

    def start_and_finish(*arguments: Any) -> Any:
        run = real(*arguments)
        run.finish()  # logging to a finished run raises
        return run

    monkeypatch.setattr(wandb_logger, "_start", start_and_finish)
    config = run_config(tmp_path, wandb="offline")
    run_dir = RunDir.claim(config)
    tracker = Tracker(run_dir.root, config, file=io.StringIO())
    for step in (1, 2, 3):
        tracker.log_step(step, {"reward": 0.5})
    tracker.close()
    run_dir.release()
    failed = [event for event in events_of(run_dir.root) if event["kind"] == "wandb_failed"]
    assert [event["action"] for event in failed] == ["log"]
    assert len(read_metrics(run_dir.metrics_path)) == 3


def test_secrets_are_redacted_by_name_only() -> None:
    tree = {"rewards": [{"params": {"api_key": "x", "token": "y", "empty_secret": None}}]}
    tree["sampling"] = {"max_tokens": 5, "tokens_per_microbatch": 6}  # type: ignore[assignment]
    assert redacted(tree) == {
        "rewards": [
            {"params": {"api_key": "<redacted>", "token": "<redacted>", "empty_secret": None}}
        ],
        "sampling": {"max_tokens": 5, "tokens_per_microbatch": 6},
    }


class Blocked:
    """A wandb module whose init, or whose runs' log, does not return before ``gate`` is set."""

    def __init__(self, hangs_in: str) -> None:
        self.hangs_in = hangs_in
        self.gate, self.reached = threading.Event(), threading.Event()
        self.logged: list[int] = []

    def Settings(self, **settings: Any) -> None: ...

    def init(self, **arguments: Any) -> Blocked:
        self._pass("init")
        return self

    def define_metric(self, *arguments: Any, **options: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self._pass("log")
        self.logged.append(row["step"])

    def finish(self, exit_code: int) -> None:
        self._pass("finish")

    def _pass(self, call: str) -> None:
        if call == self.hangs_in:
            self.reached.set()
            assert self.gate.wait(60.0)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would run at exit; it would end the wandb service that the other tests use."""
    calls: list[Any] = []
    monkeypatch.setattr(wandb_logger.atexit, "register", calls.append)
    return calls


@pytest.mark.parametrize("hangs_in", ["init", "log", "finish"])
def test_wandb_that_hangs_never_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: list[Any], hangs_in: str
) -> None:
    fake = Blocked(hangs_in)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(wandb_logger, "_FINISH_TIMEOUT_S", 0.5)
    config = run_config(tmp_path, wandb="offline")
    run_dir = RunDir.claim(config)
    logger = WandbLogger(run_dir, config)
    if hangs_in != "finish":
        logger.log_step(0, {"reward": 0.0})
        assert fake.reached.wait(30.0)
    steps = range(1, wandb_logger._MAX_QUEUED + 51)
    taken_s = []
    for step in steps:
        started = time.perf_counter()
        logger.log_step(step, {"reward": 0.5})
        taken_s.append(time.perf_counter() - started)
    # The machine may stop this process now and then, so the median is what cannot be large.
    assert statistics.median(taken_s) < 1e-3
    started = time.perf_counter()
    logger.close(0)
    assert time.perf_counter() - started < 30.0
    events = dict(logger.take_events())
    assert events["wandb_failed"]["action"] == "finish"
    assert registered == [wandb_logger._end_service]
    sent = list(fake.logged)
    if hangs_in != "finish":
        # In init, step 0 waits in the queue; in log it has left it.
        num_dropped = 50 + (hangs_in == "init")
        assert events["wandb_slow"] == {"queued": wandb_logger._MAX_QUEUED}
        assert events["wandb_dropped"] == {"records": num_dropped}
        assert f"{wandb_logger._MAX_QUEUED} records" in events["wandb_failed"]["error"]
        assert sent == []
    fake.gate.set()
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(30.0)
            assert not thread.is_alive()
    # A call that returns after all is the last one: nothing is sent behind the run's end.
    assert len(fake.logged) - len(sent) <= 1
    assert logger.take_events() == []
    run_dir.release()


def test_a_slow_wandb_loses_the_oldest_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Blocked("log")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = run_config(tmp_path, wandb="offline")
    run_dir = RunDir.claim(config)
    tracker = Tracker(run_dir.root, config, file=io.StringIO())
    tracker.log_step(0, {"reward": 0.0})
    assert fake.reached.wait(30.0)
    count = wandb_logger._MAX_QUEUED + 3
    for step in range(1, count + 1):
        tracker.log_step(step, {"reward": 0.5})
    fake.gate.set()
    tracker.close()
    run_dir.release()
    assert fake.logged == [0, *range(4, count + 1)]
    events = [event for event in events_of(run_dir.root) if event["kind"].startswith("wandb")]
    assert [event["kind"] for event in events] == ["wandb_slow", "wandb_dropped"]
    assert events[1]["records"] == 3
    assert len(read_metrics(run_dir.metrics_path)) == count + 1


def test_a_stopped_wandb_service_delays_neither_steps_nor_the_exit(tmp_path: Path) -> None:
    """The real thing: wandb's helper process is stopped by SIGSTOP, as by a full machine."""
    code = f"""
import io, os, signal, sys, time
import psutil
from raygrpo.config.file import load_config
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking import wandb_logger
from raygrpo.tracking.tracker import Tracker
wandb_logger._FINISH_TIMEOUT_S = 3.0
config = load_config({{
    "run_dir": {str(tmp_path / "run")!r}, "model": {{"path": "m"}}, "data": {{"source": "d"}},
    "tracking": {{"wandb": "offline"}}, "train": {{"steps": 40}},
}})
run_dir = RunDir.claim(config)
tracker = Tracker(run_dir.root, config, file=io.StringIO())
tracker.log_step(1, {{"reward": 0.5}})
while tracker._wandb._worker._items or tracker._wandb._worker._run is None:
    time.sleep(0.01)
service, = [p for p in psutil.Process().children() if p.name() == "wandb-core"]
service.suspend()
print("suspended", flush=True)
for step in range(2, 41):
    tracker.log_step(step, {{"reward": 0.5}})
tracker.close()
print("closed", flush=True)
"""
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # of its own
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["suspended", "closed"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 40
    (failed,) = [e for e in events_of(tmp_path / "run") if e["kind"].startswith("wandb")]
    assert failed["kind"] == "wandb_failed"
    assert failed["action"] == "finish"


def completion_rows(step: int, count: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "exact": index / 2,
            "step": step,
            "prompt": [{"role": "user", "content": "2+2="}] if index else "1+1=",
            "completion": f"{step}-{index} \u00e9",
            "reward": None if index else step / 2,
            "advantage": 0.25 - index,
        }
        for index in range(count)
    ]


def test_completions_are_an_incremental_table_that_a_resumed_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, wandb="offline")
    run_dir = RunDir.claim(config)
    columns = ["step", "prompt", "completion", "reward", "advantage", "exact"]
    messages = json.dumps([{"role": "user", "content": "2+2="}])
    for resume_step, steps in ((None, (1, 2)), (2, (3,))):
        tracker = Tracker(run_dir.root, config, resume_step=resume_step, file=io.StringIO())
        for step in steps:
            tracker.log_step(step, {"reward": 0.5})
            tracker.log_completions(step, completion_rows(step))
        tracker.log_completions(9, [])
        tracker.close()
    run_dir.release()
    assert not [e for e in events_of(run_dir.root) if e["kind"].startswith("wandb")]
    tables: dict[int, list[Any]] = {}
    for directory in sorted((run_dir.root / "wandb").glob("offline-run-*")):
        rows, _, run_id = read_offline(directory)
        assert run_id == run_dir.facts["wandb_id"]
        logged = [row for row in rows if "completions/_type" in row]
        for number, row in enumerate(logged):
            assert row["completions/_type"] == "incremental-table-file"
            assert row["completions/increment_num"] == number
            table = json.loads((directory / "files" / row["completions/path"]).read_text())
            assert table["columns"] == columns
            assert row["step"] not in tables
            tables[row["step"]] = table["data"]
    # Each call's rows, and no more: what was logged before is not sent again.
    assert tables == {
        step: [
            [step, "1+1=", f"{step}-0 \u00e9", step / 2, 0.25, 0.0],
            [step, messages, f"{step}-1 \u00e9", None, -0.75, 0.5],
        ]
        for step in (1, 2, 3)
    }


# TensorBoard.


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(directory), purge_orphaned_data=True)
    shown.Reload()
    return {
        tag: [(event.step, event.value) for event in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    config = run_config(tmp_path, tensorboard=True)
    check_tensorboard(config)
    run_dir = RunDir.claim(config)
    directory = run_dir.root / "tensorboard"
    for resume_step, steps in ((None, (0, 1, 2, 3)), (1, (2, 3))):
        tracker = Tracker(run_dir.root, config, resume_step=resume_step, file=io.StringIO())
        for step in steps:
            value = step / 4 + (0 if resume_step is None else 8)
            tracker.log_step(step, {"reward": value, "rewards/exact/mean": 1.0, "kl": math.nan})
            # On disk at once, as the metrics are.
            assert scalars(directory)["reward"][-1] == (step, value)
        if resume_step is None:
            first_start = run_dir.root / "first"
            shutil.copytree(directory, first_start)
        tracker.close()
    run_dir.release()
    assert scalars(first_start)["reward"] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert scalars(directory) == {
        "reward": [(0, 0.0), (1, 0.25), (2, 8.5), (3, 8.75)],
        "rewards/exact/mean": [(step, 1.0) for step in range(4)],
    }


def test_a_start_from_step_0_hides_all_that_was_there(tmp_path: Path) -> None:
    def refuse(kind: str, fields: dict[str, Any]) -> None:
        raise AssertionError(f"{kind}: {fields}")

    for value in (1.0, 2.0):
        writer = TensorBoardWriter(tmp_path, resume_step=None, on_event=refuse)
        for step in range(2 if value == 1.0 else 1):
            writer.log_step(step, {"reward": value})
        writer.close()
        writer.close()
    assert scalars(tmp_path) == {"reward": [(0, 2.0)]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path: Path) -> None:
    """/dev/full answers every write with "no space left on device"."""
    events: list[tuple[str, dict[str, Any]]] = []
    writer = TensorBoardWriter(
        tmp_path, resume_step=None, on_event=lambda kind, fields: events.append((kind, fields))
    )
    file = writer._writer.file_writer.event_writer
    file._general_file_writer.filename = "/dev/full"
    for step in range(1, 4):
        writer.log_step(step, {"reward": 0.5})
    writer.close()
    file._async_writer._worker.join()  # its end is what the filter above is for
    assert [kind for kind, _ in events] == ["tensorboard_failed"]
    assert "space" in events[0][1]["error"]


def test_a_directory_that_cannot_be_made_ends_tensorboard_and_not_the_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, tensorboard=True)
    run_dir = RunDir.claim(config)
    (run_dir.root / "tensorboard").write_text("in the way")
    tracker = Tracker(run_dir.root, config, file=io.StringIO())
    tracker.log_step(1, {"reward": 0.5})
    tracker.close()
    run_dir.release()
    assert [e["kind"] for e in events_of(run_dir.root)] == ["tensorboard_failed"]


def test_a_missing_tensorboard_is_found_at_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    check_tensorboard(run_config(tmp_path))
    with pytest.raises(ConfigError) as raised:
        check(run_config(tmp_path, tensorboard=True))
    assert not (tmp_path / "run").exists()
    assert "install the extra tensorboard" in raised.value.fix
