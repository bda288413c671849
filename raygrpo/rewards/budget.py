"""How many scores may fail before a run stops: ``scorers.max_reward_error_frac``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raygrpo.errors import RewardError
from raygrpo.types import Score


@dataclass(slots=True, kw_only=True)
class ScoreBudget:
    """Counts the scores of a step or an evaluation, and the errored ones among them.

    Example: with ``max_error_frac=0.1`` and ``num_planned=64``, the seventh error raises.
    ``num_planned`` is how many scores belong to the whole: the first error of many is no reason to
    stop.
    """

    max_error_frac: float
    num_planned: int
    num_scores: int = 0
    num_errors: int = 0

    def take(self, scores: Sequence[Score], traceback: str | None = None) -> None:
        """Counts the scores of a group; ``traceback`` is shown beside the error's message.

        Raises:
            RewardError: too many scores failed.
        """
        errors = [score.error for score in scores if score.error is not None]
        self.num_scores += len(scores)
        self.num_errors += len(errors)
        of = max(self.num_scores, self.num_planned)
        # Even where every failure is allowed: without any score no step is ever complete.
        hopeless = self.num_scores >= 2 * self.num_planned and self.num_errors == self.num_scores
        if self.num_errors > self.max_error_frac * of or hopeless:
            first = errors[0] if errors else "see events.jsonl"
            trace = f"\nfirst traceback:\n{traceback}" if traceback else ""
            raise RewardError(
                f"{self.num_errors} of {of} scores failed (scorers.max_reward_error_frac is "
                f"{self.max_error_frac:g}); {first}{trace}",
                "correct the reward function, or raise its timeout_s",
            )
