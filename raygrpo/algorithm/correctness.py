"""Right answers: which completions are correct, and rates over the completions of a prompt."""

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
    """Whether each judged completion is correct; completions without a judgement are left out."""
    verdicts = map(is_correct, summary.scores)
    return [right for right in verdicts if right is not None]


def pass_rate(summary: GroupSummary) -> float | None:
    """The share of correct completions among the judged ones; None if none was judged."""
    verdicts = judged(summary)
    return sum(verdicts) / len(verdicts) if verdicts else None


def pass_at_k(num: int, num_correct: int, k: int) -> float | None:
    """The chance that k of ``num`` completions, drawn without repetition, include a correct one.

    The mean over prompts estimates pass@k without bias (appendix B of arXiv 2107.03374). A product
    of k ratios gives 1 - C(n - c, k) / C(n, k). None where num < k. Example: 1 correct of 4 gives
    0.25 for k = 1 and 0.5 for k = 2.
    """
    if num < k:
        return None
    missed = 1.0
    for drawn in range(k):
        missed *= max(num - num_correct - drawn, 0) / (num - drawn)
    return 1.0 - missed


def majority_correct(summary: GroupSummary) -> float | None:
    """The chance that the most frequent answer is correct, ties broken at random.

    Each judged completion votes for its answer. An empty answer counts only if there is no other
    answer. None if no completion was judged.
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
    """The answer of each completion: the column ``answer`` that a reward logged, else the text.

    A long answer becomes a checksum, so that equal answers stay equal. An answer of None becomes
    the empty string.
    """
    given = extras.get("answer", texts)
    return tuple("" if answer is None else _shortened(str(answer).strip()) for answer in given)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORT else f"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}"
