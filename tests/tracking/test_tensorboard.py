"""TensorBoard's files after a resume, and without room for them."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from raygrpo.checks.checked import check
from raygrpo.errors import ConfigError
from raygrpo.tracking.tensorboard import TensorBoardWriter, check_tensorboard
from tests.tracking.tracking_cases import events_of, run_config, tracked


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
    check_tensorboard(run_config(tmp_path, tensorboard=True))
    directory, first_start = tmp_path / "run" / "tensorboard", tmp_path / "first"
    for resume_step, steps in ((None, (0, 1, 2, 3)), (1, (2, 3))):
        with tracked(tmp_path, resume_step, tensorboard=True) as tracker:
            for step in steps:
                value = step / 4 + (0 if resume_step is None else 8)
                tracker.log_step(step, {"reward": value, "rewards/exact/mean": 1.0, "kl": math.nan})
                # On disk at once, as the metrics are.
                assert scalars(directory)["reward"][-1] == (step, value)
            if resume_step is None:
                shutil.copytree(directory, first_start)
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
    with tracked(tmp_path):
        (tmp_path / "run" / "tensorboard").write_text("in the way")
    with tracked(tmp_path, tensorboard=True) as tracker:
        tracker.log_step(1, {"reward": 0.5})
    assert [e["kind"] for e in events_of(tmp_path / "run")] == ["tensorboard_failed"]


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
