"""The metrics of a step and of an evaluation, such as ``{"reward": 0.5}``, under TRL's names.

``reward*``, ``completions/*``, ``rewards/*`` and ``frac_*`` describe all groups that finished for
the step, dropped groups too: with refill, the trained groups alone would hide the policy's
progress. ``trained/*`` describes the groups that the step trained on. A standard deviation has
ddof 1, as TRL's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raygrpo.algorithm.correctness import judged, majority_correct, pass_at_k, pass_rate
from raygrpo.types import GroupSummary, Stat

# TRL compares by torch.isclose(x, 0) whether a group's rewards differ.
_ZERO_STD = 1e-8
_RATIO, _RATIO_SQUARED = "sampling/token_ratio", "sampling/token_ratio_squared"
_GAP = "sampling/sampling_logp_difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """The facts of a step that its metrics are made of.

    ``finished``: the groups that came back since the last step, ``num_teaching`` of them with
    signal; ``trained``: the groups that the step trained on. ``num_tokens``: prompt and completion
    tokens of the whole run so far. ``step_s``: the seconds between the ends of two steps;
    ``update_s``: the learner's part of them.
    """

    step: int
    finished: Sequence[GroupSummary]
    trained: Sequence[GroupSummary]
    num_teaching: int
    stats: Mapping[str, Stat]
    epoch: float
    num_tokens: int
    step_s: float
    update_s: float


def step_metrics(facts: StepFacts) -> dict[str, float]:
    """All metrics of a step; a metric without a value (a mean over nothing) is left out."""
    finished, trained = facts.finished, facts.trained
    num_completion_tokens = sum(sum(group.lengths) for group in finished)
    metrics = {
        **reward_metrics(finished),
        **completion_metrics(finished),
        **_prefixed("trained/", {**reward_metrics(trained), **completion_metrics(trained)}),
        **stat_metrics(facts.stats),
        **staleness_metrics(facts.step, trained),
        **source_metrics(finished),
        "epoch": facts.epoch,
        "num_tokens": float(facts.num_tokens),
        "num_groups": float(len(finished)),
        "trained/num_groups": float(len(trained)),
        "step_time": facts.step_s,
        "timing/update_s": facts.update_s,
    }
    if finished:
        metrics["frac_no_signal"] = 1 - facts.num_teaching / len(finished)
    for name in ("generate_s", "score_s"):
        times = [getattr(group, name) for group in finished]
        metrics |= _mean(f"timing/{name}", times)
    metrics |= reward_times(finished)
    if facts.step_s > 0:
        metrics["timing/tokens_per_s"] = num_completion_tokens / facts.step_s
    return metrics


def reward_metrics(groups: Sequence[GroupSummary]) -> dict[str, float]:
    """Rewards of groups. Completions without a reward (None, or an error) are in no mean.

    ``reward``, ``reward_std``: mean and deviation over completions. ``group_reward_std``: mean over
    groups of the group's deviation; groups with fewer than two rewards have none.
    ``frac_reward_zero_std``: share of all groups whose rewards are equal.
    ``reward/error_frac``: share of errored completions.
    """
    scores = [score for group in groups for score in group.scores]
    metrics = _mean_and_std(
        "reward", "reward_std", [s.value for s in scores if s.value is not None]
    )
    metrics |= _mean("reward/error_frac", [float(s.error is not None) for s in scores])
    deviations = []
    for group in groups:
        values = [score.value for score in group.scores if score.value is not None]
        if len(values) > 1:
            deviations.append(statistics.stdev(values))
    metrics |= _mean("group_reward_std", deviations)
    if groups:
        num_alike = sum(deviation <= _ZERO_STD for deviation in deviations)
        metrics["frac_reward_zero_std"] = num_alike / len(groups)
    for name in sorted({name for score in scores for name in score.parts}):
        parts = [p for s in scores if s.error is None and (p := s.parts.get(name)) is not None]
        metrics |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", parts)
    # A reward's own names do not replace ours.
    return _reported_metrics(groups) | metrics


def source_metrics(groups: Sequence[GroupSummary]) -> dict[str, float]:
    """The number of groups, ``reward`` and ``frac_reward_zero_std`` of each part of a mixture."""
    metrics: dict[str, float] = {}
    for source in sorted({group.source for group in groups if group.source}):
        own = [group for group in groups if group.source == source]
        rewards = reward_metrics(own)
        metrics[f"sources/{source}/num_groups"] = float(len(own))
        for name in {"reward", "frac_reward_zero_std"} & rewards.keys():
            metrics[f"sources/{source}/{name}"] = rewards[name]
    return metrics


def reward_times(groups: Sequence[GroupSummary]) -> dict[str, float]:
    """``timing/rewards/{name}_s``: seconds that a reward takes for one group, mean over groups."""
    metrics: dict[str, float] = {}
    for name in sorted({name for group in groups for name in group.reward_s}):
        times = [group.reward_s[name] for group in groups if name in group.reward_s]
        metrics |= _mean(f"timing/rewards/{name}_s", times)
    return metrics


def completion_metrics(groups: Sequence[GroupSummary]) -> dict[str, float]:
    """Lengths in tokens: of all completions, and of terminated ones, which ended by themselves."""
    pairs = [pair for g in groups for pair in zip(g.lengths, g.finishes, strict=True)]
    if not pairs:
        return {}
    lengths = [length for length, _ in pairs]
    terminated = [length for length, finish in pairs if finish == "stop"]
    # TRL's convention: with nothing terminated, these lengths are 0.
    ended = terminated or [0]
    return {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1 - len(terminated) / len(lengths),
        "completions/mean_terminated_length": statistics.fmean(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
    }


def stat_metrics(stats: Mapping[str, Stat]) -> dict[str, float]:
    """The learner's statistics: the mean of each, but for ``*_min`` and ``*_max``.

    ``sampling/*`` has mean, min and max, as TRL's.
    ``ess`` is the effective sample size of the sampler's ratios as a share of the tokens:
    (sum w)^2 / (n sum w^2), 1 when sampler and learner agree.
    """
    metrics: dict[str, float] = {}
    for name, stat in stats.items():
        if not stat.count or name in (_RATIO, _RATIO_SQUARED):
            continue
        if name.startswith("sampling/"):
            metrics |= {f"{name}/mean": stat.mean, f"{name}/min": stat.min, f"{name}/max": stat.max}
        else:
            kind = name.rpartition("_")[2]
            metrics[name] = {"min": stat.min, "max": stat.max}.get(kind, stat.mean)
    gap = stats.get(_GAP)
    if gap and gap.count:
        metrics |= {"sampling/logprob_gap_mean": gap.mean, "sampling/logprob_gap_max": gap.max}
    ratio, squared = stats.get(_RATIO), stats.get(_RATIO_SQUARED)
    if ratio and squared and ratio.count and squared.sum > 0:
        metrics["ess"] = ratio.sum**2 / (ratio.count * squared.sum)
    return metrics


def staleness_metrics(step: int, groups: Sequence[GroupSummary]) -> dict[str, float]:
    """The lag of each trained completion's oldest token behind version ``step``, in versions."""
    lags = [float(step - version.step) for group in groups for version in group.oldest]
    if not lags:
        return {}
    return {"staleness/mean": statistics.fmean(lags), "staleness/max": max(lags)}


def _reported_metrics(groups: Sequence[GroupSummary]) -> dict[str, float]:
    """Means of the values that reward functions gave to ``log_metric``."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for name, reported in group.metrics.items():
            values.setdefault(name, []).extend(reported)
    metrics: dict[str, float] = {}
    for name, reported_values in sorted(values.items()):
        metrics |= _mean(name, [v for v in reported_values if math.isfinite(v)])
    return metrics


def _mean_and_std(mean: str, std: str, values: Sequence[float]) -> dict[str, float]:
    metrics = _mean(mean, values)
    return metrics | {std: statistics.stdev(values)} if len(values) > 1 else metrics


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}


def evaluation_metrics(
    greedy: Sequence[GroupSummary], sampled: Sequence[GroupSummary], num_completions: int
) -> dict[str, float]:
    """Metrics of an evaluation with ``num_completions`` sampled completions of each prompt.

    Completions without a judgement are in no rate. A prompt with fewer than k judged completions
    is left out of pass@k, and counted in ``eval/pass@k/num_left_out``.
    """
    metrics = _means("eval/", sampled) | _means("eval/greedy/", greedy)
    metrics |= _mean("eval/greedy/accuracy", map(pass_rate, greedy))
    if not sampled:
        return metrics
    metrics |= _mean(f"eval/avg@{num_completions}", map(pass_rate, sampled))
    metrics |= _mean(f"eval/maj@{num_completions}", map(majority_correct, sampled))
    verdicts = [judged(summary) for summary in sampled]
    k = 1
    while k <= num_completions:
        rates = [pass_at_k(len(rights), sum(rights), k) for rights in verdicts]
        metrics |= _mean(f"eval/pass@{k}", rates)
        if left_out := rates.count(None):
            metrics[f"eval/pass@{k}/num_left_out"] = float(left_out)
        k *= 2
    return metrics


def _means(prefix: str, summaries: Sequence[GroupSummary]) -> dict[str, float]:
    if not summaries:
        return {}
    scores = [score for summary in summaries for score in summary.scores]
    metrics = {
        "num_completions": float(len(scores)),
        "num_errored": float(sum(score.error is not None for score in scores)),
    }
    return _prefixed(prefix, metrics | reward_metrics(summaries) | completion_metrics(summaries))


def _mean(name: str, values: Iterable[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return {name: statistics.fmean(known)} if known else {}
