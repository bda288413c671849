"""The tracker: one step on disk, on screen and in a picture."""

from __future__ import annotations

from pathlib import Path

from raygrpo.tracking.files import read_metrics
from tests.tracking.tracking_cases import events_of, tracked


def test_the_tracker_records_everything_and_resumes(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with tracked(tmp_path) as tracker:
        for step in (1, 2):
            tracker.log_step(step, {"reward": step / 4})
        tracker.event("worker_replaced", worker="generator-0")
        assert tracker.last_metrics == {"reward": 0.5}
        tracker.close()  # a second time at the end
    assert (root / "curve.png").is_file()
    with tracked(tmp_path, resume_step=1) as again:
        again.log_step(2, {"reward": 0.75})
    assert [row["reward"] for row in read_metrics(root / "metrics.jsonl")] == [0.25, 0.75]
    assert [event["kind"] for event in events_of(root)] == ["worker_replaced"]
