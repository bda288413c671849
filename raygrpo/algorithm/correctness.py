"""What counts as a right answer, and rates over several completions of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from raygrpo.types import GroupSummary, Score

_SHORT = 64


def is_correct(score: Score) -> bool | None:
    """Whether the first reward is at least 1; None where the completion has no such value."""
    first = next(iter(score.parts.values()), None)
    return None if score.error is not None or first is None else first >= 1.0


def judged(summary: GroupSummary) -> list[bool]:
    """Whether each completion is correct, those without a judgement left out."""
    verdicts = map(is_correct, summary.scores)
    return [right for right in verdicts if right is not None]


def pass_rate(summary: GroupSummary) -> float | None:
    """Share of correct completions among those that were judged; None where none was."""
    verdicts = judged(summary)
    return sum(verdicts) / len(verdicts) if verdicts else None


def pass_at_k(num: int, num_correct: int, k: int) -> float | None:
    """The chance that k of ``num`` completions, drawn without repetition, hold a correct one.

    Averaged over prompts it estimates pass@k without bias: 1 - C(n - c, k) / C(n, k), formed as a
    product of k ratios (appendix B of arXiv 2107.03374 has the estimator). None where num < k.
    """
    if num < k:
        return None
    missed = 1.0
    for drawn in range(k):
        missed *= max(num - num_correct - drawn, 0) / (num - drawn)
    return 1.0 - missed


def majority_correct(summary: GroupSummary) -> float | None:
    """The chance that the most frequent answer is correct, ties broken at random.

    Judged completions vote by their answer; those with an empty one only where nobody has another.
    None where none was judged.
    """
    votes: dict[str, list[bool]] = {}
    for answer, score in zip(summary.answers, summary.scores, strict=True):
        if (right := is_correct(score)) is not None:
            votes.setdefault(answer, []).append(right)
    candidates = {answer: rights for answer, rights in votes.items() if answer} or votes
    if not candidates:
        return None
    most = max(map(len, candidates.values()))
    tied = [right for rights in candidates.values() if len(rights) == most for right in rights]
    return sum(tied) / len(tied)


def answers_of(texts: Sequence[str], extras: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """What each completion answers: the column ``answer`` a reward logged, else its whole text.

    Equal answers stay equal and different ones different, but long ones become a checksum; a
    completion whose answer the reward gave as None has an empty one.
    """
    given = extras.get("answer", texts)
    return tuple("" if answer is None else _shortened(str(answer).strip()) for answer in given)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORT else f"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}"
