"""Draws docs/raygrpo.svg: the pipe of a run beside the curves of examples/chain_sum.

    python docs/picture.py

The curves are the table of measured accuracies in examples/chain_sum/README.md.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).parent
INK, SHADE = "#1f3a5f", "#eef3f9"
# Name, what it does, and its centre in a space of 10 x 8.
BOXES = {
    "prompts": ("the dataset's rows", 1.8, 6.6),
    "generators": ("sample G completions", 5.8, 6.6),
    "scorers": ("run the reward functions", 8.0, 3.9),
    "learner": ("GRPO step, DeepSpeed ZeRO", 5.8, 1.2),
    "weight store": ("versions, lossless deltas", 1.8, 3.9),
}
ARROWS = [
    ("prompts", "generators", ""),
    ("generators", "scorers", "groups"),
    ("scorers", "learner", "scores"),
    ("learner", "weight store", "publish"),
    ("weight store", "generators", "pull"),
]


def curves(readme: Path) -> dict[str, list[float]]:
    """The rows of the table whose first cell is ``step``, by their first cell."""
    rows = {}
    for line in readme.read_text().splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if cells[0] == "step" or cells[0].startswith("seed"):
            rows[cells[0]] = [float(cell) for cell in cells[1:]]
    return rows


def draw_pipe(axes: Axes) -> None:
    """The five parts and what flows between them."""
    axes.set(xlim=(0, 10), ylim=(0, 8))
    axes.axis("off")
    boxes = {}
    for name, (does, x, y) in BOXES.items():
        corner = (x - 1.6, y - 0.65)
        box = FancyBboxPatch(corner, 3.2, 1.3, boxstyle="round,pad=0.06", fc=SHADE, ec=INK)
        boxes[name] = axes.add_patch(box)
        axes.text(x, y + 0.2, name, ha="center", va="center", weight="bold", color=INK)
        axes.text(x, y - 0.27, does, ha="center", va="center", size=6.5)
    for start, end, label in ARROWS:
        (_, x, y), (_, u, v) = BOXES[start], BOXES[end]
        arrow = FancyArrowPatch(
            (x, y), (u, v), patchA=boxes[start], patchB=boxes[end], arrowstyle="-|>",
            shrinkA=1, shrinkB=1, mutation_scale=11, color=INK,
        )  # fmt: skip
        axes.add_patch(arrow)
        axes.text((x + u) / 2 + 0.25, (y + v) / 2, label, size=7.5, style="italic")


def draw_curves(axes: Axes, rows: dict[str, list[float]]) -> None:
    """Held-out accuracy by step, one line a seed."""
    steps = rows.pop("step")
    for name, values in rows.items():
        axes.plot(steps, values, marker="o", markersize=3, label=name)
    axes.axhline(0.1, color="grey", linewidth=0.8, linestyle="--")
    axes.text(steps[-1], 0.12, "best constant answer", ha="right", size=7, color="grey")
    axes.set(ylim=(0, 1), xlabel="step", title="SmolLM2-135M learns sums on two CPU cores")
    axes.set_ylabel("accuracy on held-out problems")
    axes.title.set_size(9)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.2))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Writes the picture beside this script."""
    matplotlib.rcParams.update({"svg.hashsalt": "raygrpo", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(9, 3.4))
    pipe, curve = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_pipe(pipe)
    draw_curves(curve, curves(DOCS.parent / "examples" / "chain_sum" / "README.md"))
    figure.tight_layout()
    figure.savefig(DOCS / "raygrpo.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
