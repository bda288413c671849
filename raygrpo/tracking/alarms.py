"""Alarms from the metrics of steps: no signal, truncation, entropy collapse, gradient spikes, a
sampler that is stale or differs from the learner. An alarm is recorded once, when it begins."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raygrpo.config import RunConfig

# Steps that a judgement looks at: the mean of one step with few groups says little.
WINDOW = 5
SPIKE_WINDOW = 20
# Log-ratios of deviation s (nats a token) leave an effective sample size of exp(-s^2): s = 0.47.
ESS_LIMIT = 0.8
# Nats a token; rounding to bfloat16 on one side stays near 0.02.
GAP_LIMIT = 0.1

Judge = Callable[[Sequence[float], Sequence[float]], tuple[float, float] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """An alarm that begins: the metric's ``value``, the ``limit`` that it passed, and the ``fix``.

    Example: ``Alarm(name="truncation", metric="completions/clipped_ratio", value=0.6, limit=0.5,
    fix="raise sampling.max_tokens, ...")``.
    """

    name: str
    metric: str
    value: float
    limit: float
    fix: str


@dataclass(frozen=True, slots=True)
class _Rule:
    """``judge`` takes the run's first values of ``metric`` and the newest ones, each oldest first.

    It returns (value, limit) if the value passes the limit, else None.
    """

    name: str
    metric: str
    judge: Judge
    fix: str


def _above(limit: float) -> Judge:
    def judge(first: Sequence[float], newest: Sequence[float]) -> tuple[float, float] | None:
        recent = newest[-WINDOW:]
        value = statistics.fmean(recent)
        return (value, limit) if len(recent) == WINDOW and value > limit else None

    return judge


def _at_once(limit: float, *, below: bool) -> Judge:
    def judge(first: Sequence[float], newest: Sequence[float]) -> tuple[float, float] | None:
        value = newest[-1]
        return (value, limit) if (value < limit if below else value > limit) else None

    return judge


def _collapsed(first: Sequence[float], newest: Sequence[float]) -> tuple[float, float] | None:
    if len(newest) < 2 * WINDOW:
        return None
    limit = 0.1 * statistics.fmean(first)
    value = statistics.fmean(newest[-WINDOW:])
    return (value, limit) if value < limit else None


def _spiked(first: Sequence[float], newest: Sequence[float]) -> tuple[float, float] | None:
    before = newest[:-1]
    if len(before) < WINDOW:
        return None
    limit = 10 * statistics.median(before)
    return (newest[-1], limit) if newest[-1] > limit > 0 else None


RULES = (
    _Rule(
        "skipped_updates",
        "skipped_updates_frac",
        _at_once(0.0, below=False),
        "a loss or gradient was not finite: lower optimizer.lr if it happens again",
    ),
    _Rule(
        "no_signal",
        "frac_no_signal",
        _above(0.9),
        "the prompts are too easy or too hard, or the reward hardly differs: see completions/",
    ),
    _Rule(
        "truncation",
        "completions/clipped_ratio",
        _above(0.5),
        "raise sampling.max_tokens, or add a length reward",
    ),
    _Rule(
        "entropy_collapse",
        "entropy",
        _collapsed,
        "lower optimizer.lr, or set loss.entropy_coef",
    ),
    _Rule(
        "low_ess",
        "ess",
        _at_once(ESS_LIMIT, below=True),
        "lower train.max_staleness, or set loss.correction: tis unless the ratio is to the sampler",
    ),
    _Rule(
        "logprob_gap",
        "sampling/logprob_gap_mean",
        _at_once(GAP_LIMIT, below=False),
        "generators and learner disagree: lower train.max_staleness, or compare their dtypes",
    ),
    _Rule(
        "gradient_spike",
        "grad_norm",
        _spiked,
        "lower optimizer.lr, or optimizer.max_grad_norm",
    ),
)


class Alarms:
    """Watches the metrics of a run, step by step. A restart begins with no values."""

    def __init__(self, config: RunConfig) -> None:
        # A filter (top-k, ...) renormalises the sampler's logprobs, which then differ from the
        # policy's: ratios to the sampler say nothing.
        left_out = ("low_ess", "logprob_gap") if config.changes_distribution else ()
        self._rules = [rule for rule in RULES if rule.name not in left_out]
        self._first: dict[str, list[float]] = {rule.name: [] for rule in self._rules}
        self._newest = {rule.name: deque[float](maxlen=SPIKE_WINDOW + 1) for rule in self._rules}
        self._ringing: set[str] = set()

    def check(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin with this step; a missing metric does not change its alarm."""
        begun = []
        for rule in self._rules:
            if rule.metric not in metrics:
                continue
            first, newest = self._first[rule.name], self._newest[rule.name]
            newest.append(metrics[rule.metric])
            if len(first) < WINDOW:
                first.append(metrics[rule.metric])
            passed = rule.judge(first, list(newest))
            if passed is None:
                self._ringing.discard(rule.name)
            elif rule.name not in self._ringing:
                self._ringing.add(rule.name)
                value, limit = passed
                about = {"name": rule.name, "metric": rule.metric, "fix": rule.fix}
                begun.append(Alarm(value=value, limit=limit, **about))
        return begun
