"""What the loop makes of what a wait brought, where the order within one wait matters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.actors.publishing import PublishReport
from raygrpo.actors.workers import Done
from raygrpo.algorithm.ledger import TokenLedger
from raygrpo.trainer import Trainer
from raygrpo.types import Version

REPORT = PublishReport(
    version=Version(1, 3), kind="full", num_bytes=1, full_bytes=1, changed_frac=None
)


def trainer(publish: Any, calls: list[str]) -> Trainer:
    """One between two steps; it notes what it has others do."""
    made = Trainer.__new__(Trainer)
    made._update, made._publish, made._sync = None, publish, {}
    made._ledger = TokenLedger()
    made._tracker = SimpleNamespace(event=lambda *_, **__: None)  # type: ignore[assignment]
    made._pool = SimpleNamespace(  # type: ignore[assignment]
        replace_broken=lambda _: None, load=lambda: calls.append("load")
    )
    made._start_publish = lambda: calls.append("publish")  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("state", ["idle", "published in the same wait", "under way"])
def test_lost_weights_are_published_again_unless_they_just_were(state: str) -> None:
    """A store refuses a version that it has: the loss may be older than the publish."""
    publish = None if state == "idle" else SimpleNamespace(value=REPORT, seconds=0.1)
    completed: Any = (publish,) if state == "published in the same wait" else ()
    calls: list[str] = []
    trainer(publish, calls)._take(Done(completed=completed, weights_lost=True))
    expected = {"idle": ["publish"], "published in the same wait": ["load"], "under way": []}
    assert calls == expected[state]
