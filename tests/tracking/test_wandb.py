"""wandb: online, offline or failing, never in the way of a step."""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking import wandb_logger
from raygrpo.tracking.files import read_metrics
from raygrpo.tracking.wandb_logger import WandbLogger, redacted
from tests.tracking.tracking_cases import events_of, run_config, tracked

ROOT = Path(__file__).parents[2]


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
    root = tmp_path / "run"
    ids = []
    for resume_step, steps in ((None, (1, 2)), (1, (2, 3))):
        with tracked(tmp_path, resume_step, wandb="offline") as tracker:
            for step in steps:
                tracker.log_step(step, {"reward": step / 4, "completions/mean_length": 2.0})
        ids.append(RunDir(root).facts["wandb_id"])
    assert ids[0] == ids[1]
    directories = sorted((root / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    read = [read_offline(directory) for directory in directories]
    assert {run_id for _, _, run_id in read} == {ids[0]}
    history = [[(row["step"], row["reward"]) for row in rows] for rows, _, _ in read]
    assert sorted(history) == [[(1, 0.25), (2, 0.5)], [(2, 0.5), (3, 0.75)]]
    assert read[0][1]["train"]["steps"] == 3
    assert not [e for e in events_of(root) if e["kind"] == "wandb_failed"]
    stored = b"".join(p.read_bytes() for p in root.rglob("wandb/**/*") if p.is_file())
    assert b"max_tokens" in stored
    assert b"hunter2" not in stored
    assert b"sentinel" not in stored


def test_wandb_that_cannot_start_is_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygrpo.tracking.wandb_logger.INIT_TIMEOUT_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    with tracked(tmp_path, wandb="online") as tracker:
        tracker.log_step(1, {"reward": 0.5})
    failed = [e for e in events_of(tmp_path / "run") if e["kind"] == "wandb_failed"]
    assert [event["action"] for event in failed] == ["init"]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_wandb_without_credentials_records_offline(tmp_path: Path) -> None:
    # In a process of its own: wandb keeps credentials that it has once seen.
    code = f"""
from pathlib import Path
from tests.tracking.tracking_cases import tracked
with tracked(Path({str(tmp_path)!r}), wandb="online") as tracker:
    tracker.log_step(1, {{"reward": 0.5}})
"""
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"}
    environment["NETRC"] = str(tmp_path / "no-netrc")
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    root = tmp_path / "run"
    (event,) = [event for event in events_of(root) if event["kind"].startswith("wandb")]
    assert event["kind"] == "wandb_offline"
    assert "wandb login" in event["reason"]
    assert list((root / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_that_dies_while_logging_is_one_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: list[Any]
) -> None:
    def fail(row: dict[str, Any]) -> None:
        raise RuntimeError("the run is finished")

    fake = Blocked("nowhere")
    monkeypatch.setattr(fake, "log", fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tracked(tmp_path, wandb="offline") as tracker:
        for step in (1, 2, 3):
            tracker.log_step(step, {"reward": 0.5})
    failed = [e for e in events_of(tmp_path / "run") if e["kind"] == "wandb_failed"]
    assert [event["action"] for event in failed] == ["log"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


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
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT_S", 0.5)
    config = run_config(tmp_path, wandb="offline")
    run_dir = RunDir.claim(config)
    logger = WandbLogger(run_dir, config)
    if hangs_in != "finish":
        logger.log_step(0, {"reward": 0.0})
        assert fake.reached.wait(30.0)
    steps = range(1, wandb_logger.MAX_QUEUED + 51)
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
    assert len(registered) == 1
    sent = list(fake.logged)
    if hangs_in != "finish":
        # In init, step 0 waits in the queue; in log it has left it.
        num_dropped = 50 + (hangs_in == "init")
        assert events["wandb_slow"] == {"queued": wandb_logger.MAX_QUEUED}
        assert events["wandb_dropped"] == {"records": num_dropped}
        assert f"{wandb_logger.MAX_QUEUED} records" in events["wandb_failed"]["error"]
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
    count = wandb_logger.MAX_QUEUED + 3
    with tracked(tmp_path, wandb="offline") as tracker:
        tracker.log_step(0, {"reward": 0.0})
        assert fake.reached.wait(30.0)
        for step in range(1, count + 1):
            tracker.log_step(step, {"reward": 0.5})
        fake.gate.set()
    assert fake.logged == [0, *range(4, count + 1)]
    events = [e for e in events_of(tmp_path / "run") if e["kind"].startswith("wandb")]
    assert [event["kind"] for event in events] == ["wandb_slow", "wandb_dropped"]
    assert events[1]["records"] == 3
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == count + 1


def test_a_stopped_wandb_service_delays_neither_steps_nor_the_exit(tmp_path: Path) -> None:
    """The real thing: wandb's helper process is stopped by SIGSTOP, as by a full machine."""
    code = f"""
import time
from pathlib import Path
import psutil
from raygrpo.tracking import wandb_logger
from tests.tracking.tracking_cases import tracked
wandb_logger.FINISH_TIMEOUT_S = 1.0
directory = Path({str(tmp_path)!r})
with tracked(directory, wandb="offline") as tracker:
    tracker.log_step(1, {{"reward": 0.5}})
    while not list(directory.glob("run/wandb/offline-run-*/*.wandb")):
        time.sleep(0.01)
    service, = [p for p in psutil.Process().children() if p.name() == "wandb-core"]
    service.suspend()
    print("suspended", flush=True)
    for step in range(2, 41):
        tracker.log_step(step, {{"reward": 0.5}})
print("closed", flush=True)
"""
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # of its own
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["suspended", "closed"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 40
    (failed,) = [e for e in events_of(tmp_path / "run") if e["kind"].startswith("wandb")]
    assert (failed["kind"], failed["action"]) == ("wandb_failed", "finish")


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
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    columns = ["step", "prompt", "completion", "reward", "advantage", "exact"]
    messages = json.dumps([{"role": "user", "content": "2+2="}])
    for resume_step, steps in ((None, (1, 2)), (2, (3,))):
        with tracked(tmp_path, resume_step, wandb="offline") as tracker:
            for step in steps:
                tracker.log_step(step, {"reward": 0.5})
                tracker.log_completions(step, completion_rows(step))
            tracker.log_completions(9, [])
    assert not [e for e in events_of(root) if e["kind"].startswith("wandb")]
    tables: dict[int, list[Any]] = {}
    for directory in sorted((root / "wandb").glob("offline-run-*")):
        rows, _, run_id = read_offline(directory)
        assert run_id == RunDir(root).facts["wandb_id"]
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
