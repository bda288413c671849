"""How many scores may fail before a run stops."""

from __future__ import annotations

import pytest

from raygrpo.errors import RewardError
from raygrpo.rewards.budget import ScoreBudget
from tests.builders import score

GOOD, BAD = score(1.0), score(None, "the judge is away")


def test_a_share_of_the_planned_scores_may_fail() -> None:
    budget = ScoreBudget(max_error_frac=0.25, num_planned=8)
    budget.take([BAD, BAD])
    budget.take([GOOD, GOOD])
    with pytest.raises(RewardError, match=r"3 of 8 scores failed .* is 0\.25\); the judge") as one:
        budget.take([BAD, GOOD], traceback="in line 3")
    assert "in line 3" in str(one.value)


def test_more_scores_than_planned_allow_more_errors() -> None:
    budget = ScoreBudget(max_error_frac=0.5, num_planned=2)
    budget.take([GOOD, GOOD, BAD, BAD])
    with pytest.raises(RewardError, match="3 of 5 scores failed"):
        budget.take([BAD])


def test_without_any_score_a_step_is_never_complete() -> None:
    budget = ScoreBudget(max_error_frac=1.0, num_planned=2)
    budget.take([BAD, BAD])
    with pytest.raises(RewardError, match="4 of 4 scores failed"):
        budget.take([BAD, BAD])
