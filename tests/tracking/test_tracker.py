"""The tracker: one step on disk, on screen and in a picture."""

from __future__ import annotations

import io
from pathlib import Path

from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.files import read_metrics
from raygrpo.tracking.tracker import Tracker
from tests.tracking.tracking_cases import events_of, run_config


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
