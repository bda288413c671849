"""Rates over several completions, against counting every draw."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.algorithm.correctness import (
    answers_of,
    is_correct,
    judged,
    majority_correct,
    pass_at_k,
    pass_rate,
)
from raygrpo.types import GroupSummary, Score
from tests.builders import summary


def answered(answers: Sequence[str], rewards: Sequence[float | str | None]) -> GroupSummary:
    return replace(summary(0, rewards), answers=tuple(answers))


def test_correct_is_a_first_reward_of_at_least_one() -> None:
    both = Score(value=3.5, parts={"number": 1.0, "length": -0.5})
    wrong = Score(value=0.5, parts={"number": 0.999, "length": 1.0})
    unjudged = Score(value=1.0, parts={"number": None, "length": 1.0})
    errored = Score(value=None, parts={"number": 1.0, "length": None}, error="length: it raised")
    assert [is_correct(s) for s in (both, wrong, unjudged, errored)] == [True, False, None, None]


def test_completions_without_a_judgement_are_left_out() -> None:
    group = summary(0, [1.0, None, 0.0, "raised", 1.5])
    assert judged(group) == [True, False, True]
    assert pass_rate(group) == pytest.approx(2 / 3)
    assert pass_rate(summary(0, [None, "raised"])) is None


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 9))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(rights: list[bool], k: int) -> None:
    rate = pass_at_k(len(rights), sum(rights), k)
    if k > len(rights):
        assert rate is None
        return
    draws = list(itertools.combinations(rights, k))
    expected = Fraction(sum(map(any, draws)), len(draws))
    # k factors and one difference, each rounded once.
    assert rate == pytest.approx(float(expected), abs=1e-15 * (k + 1))


def test_pass_at_k_by_hand() -> None:
    # One of 4 is correct: two draws hold it in 3 of the 6 pairs.
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 0, 4) == 0
    assert pass_at_k(4, 1, 4) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)


def test_pass_at_k_of_many_completions_stays_finite() -> None:
    """C(10000, 5000) is no float; 1 - (1 - 1/2)(1 - 5000/9999)... is."""
    assert pass_at_k(10_000, 5_000, 1) == 0.5
    rate = pass_at_k(10_000, 1, 5_000)
    assert rate is not None
    # The one correct completion is in half of the draws; 5,000 factors round.
    assert rate == pytest.approx(0.5, abs=1e-11)


def test_majority_by_hand() -> None:
    assert majority_correct(answered("aab", [1.0, 1.0, 0.0])) == 1
    assert majority_correct(answered("abb", [1.0, 0.0, 0.0])) == 0
    assert majority_correct(answered("aabb", [1.0, 1.0, 0.0, 0.0])) == 0.5
    assert majority_correct(answered("abcd", [1.0, 0.0, 0.0, 0.0])) == 0.25
    # Who gives no answer has no vote, unless nobody gives one.
    assert majority_correct(answered(["", "", "a"], [0.0, 0.0, 1.0])) == 1
    assert majority_correct(answered(["", ""], [0.0, 0.0])) == 0
    # Nor has who was not judged.
    assert majority_correct(answered("bba", [None, "raised", 1.0])) == 1
    assert majority_correct(answered("a", [None])) is None


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.sampled_from("abc"))
def test_majority_is_the_mean_over_all_ways_to_break_a_tie(answers: list[str], right: str) -> None:
    counts = Counter(answers)
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    expected = sum(answer == right for answer in winners) / len(winners)
    found = majority_correct(answered(answers, [float(a == right) for a in answers]))
    assert found == pytest.approx(expected)


def test_answers_are_what_a_reward_said_else_the_text() -> None:
    texts = ["so it is 7\n", "seven"]
    assert answers_of(texts, {}) == ("so it is 7", "seven")
    assert answers_of(texts, {"answer": ["7", None]}) == ("7", "")
    assert answers_of(texts, {"answer": [7, 8.5]}) == ("7", "8.5")


@given(st.lists(st.text(max_size=200), max_size=6))
def test_shortened_answers_differ_where_the_texts_do(texts: list[str]) -> None:
    answers = answers_of(texts, {})
    assert len(set(answers)) == len({text.strip() for text in texts})
    assert all(len(answer) <= 64 for answer in answers)
