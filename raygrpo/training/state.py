"""What the driver remembers from one start of a run to the next: a checkpoint's small half."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raygrpo.algorithm.ledger import TokenLedger
from raygrpo.algorithm.window import WindowState
from raygrpo.config import RunConfig
from raygrpo.errors import StorageError
from raygrpo.storage.checkpoint import STATE


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSoFar:
    """The best evaluation so far by ``metric``; a leading ``-`` means that lower is better.

    Example: BestSoFar(metric="eval/reward", step=40, value=0.71, num_since=2).

    ``step`` is -1 before the first evaluation. ``num_since`` counts the evaluations after the best.
    ``ended_at`` is the ``train.steps`` of a run that ended early because no better evaluation came,
    else 0.
    """

    metric: str
    step: int = -1
    value: float = math.nan
    num_since: int = 0
    ended_at: int = 0

    def take(self, step: int, metrics: Mapping[str, float], config: RunConfig) -> BestSoFar:
        """After another evaluation; an evaluation without the metric is not better."""
        if not self.metric:
            return self
        value = metrics.get(self.metric.removeprefix("-"), math.nan)
        gain = self.value - value if self.metric.startswith("-") else value - self.value
        if math.isfinite(value) and (self.step < 0 or gain > 0):
            return BestSoFar(metric=self.metric, step=step, value=value)
        later = replace(self, num_since=self.num_since + 1, ended_at=config.train.steps)
        return later if later.has_ended(config) else replace(later, ended_at=0)

    def has_ended(self, config: RunConfig) -> bool:
        """Whether a run in this state trains no further."""
        return self.ended_at > 0 and 0 < config.eval.best.patience <= self.num_since

    def resumed(self, config: RunConfig) -> BestSoFar:
        """For a run that goes on. Another metric starts from nothing. The patience starts anew
        where the run ended early and is given more steps."""
        if self.metric != (config.eval.best.metric or ""):
            return BestSoFar(metric=config.eval.best.metric or "")
        if 0 < self.ended_at < config.train.steps:
            return replace(self, num_since=0, ended_at=0)
        return self

    def fact(self) -> dict[str, Any] | None:
        """The best evaluation as run.json names it."""
        if self.step < 0:
            return None
        return {"step": self.step, "metric": self.metric, "value": self.value}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The driver's state after a step; the learner's files lie beside it in the checkpoint.

    Example: after step 40 of 8 groups each, RunState(step=40, window=WindowState(admitted=320,
    ...), prompts={"index": 320, ...}, ledger=TokenLedger(...), num_tokens=90_000, ...).

    ``buffered_tokens`` are of finished groups that waited in the window: a resumed run generates
    them again. ``record`` are the step's metrics where its evaluation is still due, None where they
    are logged. ``normal_gap`` is the probe's gap of the run's first version, in nats.
    """

    step: int
    window: WindowState
    prompts: dict[str, Any]
    ledger: TokenLedger
    num_tokens: int
    buffered_tokens: int
    record: dict[str, float] | None = None
    normal_gap: float | None = None
    best: BestSoFar = field(default_factory=lambda: BestSoFar(metric=""))


def load_state(path: Path) -> RunState:
    """The driver's state in a checkpoint. It is a pickle: load none but your own.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with (path / STATE).open("rb") as file:
            state = pickle.load(file)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise StorageError(f"cannot read {path / STATE}: {error}") from error
    if not isinstance(state, RunState):
        raise StorageError(f"{path / STATE} holds no run state")
    return state
