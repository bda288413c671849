"""The learning curve of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from raygrpo.errors import StorageError
from raygrpo.tracking.files import read_metrics

_SERIES = (
    ("reward", "reward, sampled in training", "-"),
    ("eval/greedy/reward", "reward on the evaluation set, greedy", "o-"),
    ("eval/reward", "reward on the evaluation set, sampled", "s-"),
)


def draw_curve(metrics_path: Path, png_path: Path) -> bool:
    """Draws the rewards over steps; returns False and writes no file if there are none.

    Raises:
        StorageError: the metrics cannot be read, or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    curves = [(points(rows, name), label, style) for name, label, style in _SERIES]
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return False
    # pyplot would keep every figure alive and pick a window system.
    figure = Figure(figsize=(7.0, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for series, label, style in curves:
        steps, values = zip(*series, strict=True)
        axes.plot(steps, values, style, label=label, markersize=4, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_title(metrics_path.absolute().parent.name)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    temporary = png_path.with_name(f".{png_path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(png_path)
    except OSError as error:
        raise StorageError(f"cannot write {png_path}: {error}") from error
    return True


def points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a metric, finite values alone."""
    return [
        (row["step"], float(row[name]))
        for row in rows
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    ]
