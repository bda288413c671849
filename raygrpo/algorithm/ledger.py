"""The token ledger: every completion token that reaches the driver has exactly one fate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from raygrpo.types import FinishedGroup, GroupSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLedger:
    """Completion tokens of the training stream by fate, over the whole run; a frozen value.

    Example: TokenLedger(reported=900, trained=640, masked=60, no_signal=120) with 80 tokens that
    wait in the window has 0 unexplained tokens.

    ``reported`` tokens reached the driver. Their fates:

    - ``trained``: a step computed their loss.
    - ``masked``: a step took them without loss: truncated under the overlong filter, not written by
      the policy, or without a reward.
    - ``no_signal``, ``errored``: the group taught nothing and was dropped; its scores failed.
    - ``aborted``: written, but nothing goes on with them.
    - ``rolled_back``: finished but not trained when the run stopped; generated again.

    ``lost_groups`` counts groups that died with a worker and were sent again, ``dropped_groups``
    those that could not be served.
    """

    reported: int = 0
    trained: int = 0
    masked: int = 0
    no_signal: int = 0
    aborted: int = 0
    errored: int = 0
    rolled_back: int = 0
    lost_groups: int = 0
    dropped_groups: int = 0

    def unexplained(self, buffered: int) -> int:
        """Tokens without a fate, where ``buffered`` tokens still wait: 0, or there is a bug."""
        fates = self.trained + self.masked + self.no_signal + self.aborted
        return self.reported - fates - self.errored - self.rolled_back - buffered

    def report(self, summary: GroupSummary, *, awaited: bool = True) -> TokenLedger:
        """After a group's arrival; a group that nobody awaits is ``aborted``."""
        tokens = sum(summary.lengths)
        aborted = 0 if awaited else tokens
        return replace(self, reported=self.reported + tokens, aborted=self.aborted + aborted)

    def decide(self, decided: Iterable[FinishedGroup]) -> TokenLedger:
        """After the window decided on groups; kept groups go on waiting."""
        ledger = self
        for group in decided:
            tokens = sum(group.summary.lengths)
            if group.fate == "no_signal":
                ledger = replace(ledger, no_signal=ledger.no_signal + tokens)
            elif group.fate == "errored":
                ledger = replace(ledger, errored=ledger.errored + tokens)
        return ledger

    def take(self, summary: GroupSummary, trained: Iterable[int]) -> TokenLedger:
        """After a step took a group; ``trained`` are the loss tokens of each completion."""
        ledger = self
        columns = zip(summary.lengths, trained, summary.scores, strict=True)
        for length, num_trained, score in columns:
            if score.error is not None:
                ledger = replace(ledger, errored=ledger.errored + length)
                continue
            used = num_trained if score.value is not None else 0
            ledger = replace(
                ledger, trained=ledger.trained + used, masked=ledger.masked + length - used
            )
        return ledger

    def lose(self, groups: int) -> TokenLedger:
        """After groups died with a worker, before they were reported."""
        return replace(self, lost_groups=self.lost_groups + groups)

    def abort(self, num_tokens: int) -> TokenLedger:
        """After a generator wrote tokens that nothing goes on with."""
        return replace(self, reported=self.reported + num_tokens, aborted=self.aborted + num_tokens)

    def drop(self, groups: int) -> TokenLedger:
        """After groups were given up, before they were reported."""
        return replace(self, dropped_groups=self.dropped_groups + groups)

    def metrics(self, buffered: int) -> dict[str, float]:
        """All counts as metrics; ``buffered`` tokens still wait."""
        counts = {field.name: float(getattr(self, field.name)) for field in fields(self)}
        counts |= {"buffered": float(buffered), "unexplained": float(self.unexplained(buffered))}
        return {f"ledger/{name}": value for name, value in counts.items()}

    def roll_back(self, buffered: int) -> TokenLedger:
        """After a resume, which generates again the tokens that waited."""
        return replace(self, rolled_back=self.rolled_back + buffered)


def buffered_tokens(groups: Iterable[FinishedGroup]) -> int:
    """Tokens of finished groups that wait."""
    return sum(sum(group.summary.lengths) for group in groups)
