"""What counts as a right answer: the first configured reward gives a completion 1 or more."""

from __future__ import annotations

from raygrpo.types import GroupSummary, Score


def is_correct(score: Score) -> bool | None:
    """Whether the first reward is at least 1; None where the completion has no such value."""
    first = next(iter(score.parts.values()), None)
    return None if score.error is not None or first is None else first >= 1.0


def pass_rate(summary: GroupSummary) -> float | None:
    """Share of correct completions among those that were judged; None where none was."""
    judged = [right for score in summary.scores if (right := is_correct(score)) is not None]
    return sum(judged) / len(judged) if judged else None
