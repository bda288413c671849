"""The console, and the picture of the curve."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from raygrpo.tracking.console import Console
from raygrpo.tracking.curve import draw_curve
from raygrpo.tracking.files import MetricsFile


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
