"""Evaluations without processes: what is sent, what the numbers are, and which one is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from raygrpo.training.evaluation import Evaluation, check_best_metric, is_due, metric_names
from raygrpo.training.state import BestSoFar
from raygrpo.types import GroupSummary, Score, Version
from tests import builders
from tests.builders import summary

VERSION = Version(2, 30)


def config(**keys: Any) -> RunConfig:
    base = {
        "sampling": {"num_completions": 3, "temperature": 0.7, "filters": {"top_p": 0.9}},
        "rewards": [{"func": "number"}],
        "train": {"steps": 10},
    }
    evaluation = {"eval_steps": 1, "num_completions": 4}
    return builders.config(**{**base, "eval": {**evaluation, **keys.pop("eval", {})}, **keys})


def evaluation_of(num_prompts: int, section: RunConfig | None = None) -> Evaluation:
    return Evaluation([builders.prompt()] * num_prompts, VERSION, section or config())


def result(
    group_id: int,
    rewards: Sequence[float | str | None],
    answers: Sequence[str] = (),
    lengths: Sequence[int] | None = None,
) -> GroupSummary:
    made = summary(group_id, rewards, lengths=lengths)
    scores = tuple(replace(score, parts={"number": score.value}) for score in made.scores)
    given = tuple(answers) or ("",) * len(rewards)
    return replace(made, stream="eval", scores=scores, answers=given)


def test_greedy_and_sampled_requests() -> None:
    requests = evaluation_of(2).requests
    assert [request.group_id for request in requests] == [0, 1, 2, 3]
    assert [request.sampling.num_completions for request in requests] == [1, 4, 1, 4]
    assert [request.sampling.temperature for request in requests] == [0.0, 0.7, 0.0, 0.7]
    assert {request.sampling.top_p for request in requests} == {0.9}
    assert {request.min_version for request in requests} == {VERSION}
    alone = evaluation_of(2, config(eval={"num_completions": 0}))
    assert [request.group_id for request in alone.requests] == [0, 2]


def test_metrics_by_hand() -> None:
    evaluation = evaluation_of(3)
    evaluation.finish(result(0, [1.0], lengths=[3]))
    evaluation.finish(result(1, [1.0, 0.0, 0.0, 0.0], "7889", lengths=[1, 2, 3, 4]))
    evaluation.finish(result(2, [0.0], lengths=[5]))
    evaluation.finish(result(3, [1.0, 1.0, None, "raised"], "8811"))
    evaluation.finish(result(4, ["raised"]))
    assert not evaluation.done
    evaluation.drop()
    assert evaluation.done
    found = evaluation.metrics()
    expected = {
        "eval/greedy/num_completions": 3,
        "eval/greedy/num_errored": 1,
        "eval/greedy/reward": 1 / 2,
        "eval/greedy/rewards/number/mean": 1 / 2,
        "eval/greedy/accuracy": 1 / 2,
        "eval/greedy/completions/mean_length": (3 + 5 + 4) / 3,
        "eval/num_completions": 8,
        "eval/num_errored": 1,
        "eval/num_dropped": 1,
        "eval/reward": 3 / 6,
        "eval/completions/mean_length": (1 + 2 + 3 + 4 + 4 * 4) / 8,
        "eval/completions/clipped_ratio": 0,
        "eval/avg@4": (1 / 4 + 1) / 2,
        "eval/maj@4": (0 + 1) / 2,
        "eval/pass@1": (1 / 4 + 1) / 2,
        "eval/pass@2": (1 / 2 + 1) / 2,  # C(3, 2) / C(4, 2) = 1/2 draws miss the correct one
        "eval/pass@4": 1,  # the second prompt has only two judged completions
        "eval/pass@4/num_left_out": 1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "eval/pass@2/num_left_out" not in found
    assert "eval/pass@3" not in found


def test_an_evaluation_is_due_at_its_steps_and_at_the_end() -> None:
    section = config(eval={"eval_steps": 4}, train={"steps": 10})
    assert [step for step in range(11) if is_due(step, section)] == [0, 4, 8, 10]
    assert not is_due(0, config(eval={"eval_steps": 0}))


def take(best: BestSoFar, section: RunConfig, *values: float | None) -> BestSoFar:
    for value in values:
        step = 0 if best.step < 0 else best.step + best.num_since + 1
        metrics = {} if value is None else {"eval/reward": value}
        best = best.take(step, metrics, section)
    return best


def test_the_best_is_the_first_of_the_highest() -> None:
    section = config(eval={"best": {"metric": "eval/reward"}})
    best = take(BestSoFar(metric="eval/reward"), section, 0.1, 0.4, 0.4, math.nan, None, 0.3)
    assert (best.step, best.value, best.num_since) == (1, 0.4, 4)
    assert best.fact() == {"step": 1, "metric": "eval/reward", "value": 0.4}
    lower = take(BestSoFar(metric="-eval/reward"), section, 0.4, 0.1, 0.2)
    assert (lower.step, lower.value, lower.num_since) == (1, 0.1, 1)
    assert take(BestSoFar(metric=""), section, 0.4) == BestSoFar(metric="")
    assert BestSoFar(metric="eval/reward").fact() is None


def test_patience_counts_evaluations_in_a_row() -> None:
    section = config(eval={"best": {"metric": "eval/reward", "patience": 2}})
    fresh = BestSoFar(metric="eval/reward")
    assert not take(fresh, section, 0.1, 0.0).has_ended(section)
    assert not take(fresh, section, 0.1, 0.0, 0.2, 0.0).has_ended(section)
    ended = take(fresh, section, 0.1, 0.0, 0.2, 0.0, 0.1)
    assert ended.has_ended(section)
    # The same command again, or with fewer steps, does not go on.
    assert ended.resumed(section).has_ended(section)
    assert ended.resumed(config(eval=dict(section.eval), train={"steps": 8})).has_ended(section)
    # With more patience it does, for as long as that lasts ...
    patient = config(eval={"best": {"metric": "eval/reward", "patience": 3}})
    assert not ended.resumed(patient).has_ended(patient)
    assert take(ended.resumed(patient), patient, 0.1).has_ended(patient)
    # ... and with more steps as if nothing had ended.
    longer = config(eval=dict(section.eval), train={"steps": 20})
    assert not take(ended.resumed(longer), longer, 0.1).has_ended(longer)
    assert take(ended.resumed(longer), longer, 0.1, 0.1).has_ended(longer)
    without = config(eval={"best": {"metric": "eval/reward", "patience": 0}})
    assert not ended.resumed(without).has_ended(without)
    other = config(eval={"best": {"metric": "eval/greedy/reward", "patience": 2}})
    assert ended.resumed(other) == BestSoFar(metric="eval/greedy/reward")


def test_every_metric_of_a_whole_evaluation_can_be_the_best() -> None:
    section = config()
    evaluation = evaluation_of(2, section)
    for request in evaluation.requests:
        evaluation.finish(result(request.group_id, [1.0] * request.sampling.num_completions))
    assert metric_names(section) == set(evaluation.metrics()) - {"eval/num_dropped"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"best": {"metric": "eval/greedy/rewards"}}, "did you mean 'eval/greedy/reward'"),
        ({"best": {"metric": "eval/pass@3"}}, "did you mean 'eval/pass@"),
        ({"best": {"metric": "-eval/nothing"}, "num_completions": 0}, "eval/nothing"),
        ({"best": {"metric": "eval/reward"}, "num_completions": 0}, "mean 'eval/greedy/reward'"),
        ({"best": {"metric": "eval/rewards/exact/mean"}}, "mean 'eval/rewards/number/mean'"),
        ({"best": {"metric": "eval/reward"}, "eval_steps": 0}, "set eval.eval_steps"),
        ({"best": {"patience": 3}}, "set eval.best.metric"),
    ],
)
def test_a_metric_that_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_best_metric(config(eval=keys))


@pytest.mark.parametrize(
    "name", ["eval/reward", "-eval/completions/mean_length", "eval/maj@4", "eval/greedy/accuracy"]
)
def test_a_metric_that_can_be_is_taken(name: str) -> None:
    check_best_metric(config(eval={"best": {"metric": name}}))


def test_a_score_of_several_rewards_is_judged_by_the_first() -> None:
    rewards = [{"func": "number"}, {"func": "format", "params": {"pattern": "x"}}]
    evaluation = evaluation_of(1, config(rewards=rewards, eval={"num_completions": 0}))
    made = result(0, [0.0])
    score = Score(value=1.0, parts={"number": 0.0, "format": 1.0})
    evaluation.finish(replace(made, scores=(score,)))
    found = evaluation.metrics()
    assert (found["eval/greedy/reward"], found["eval/greedy/accuracy"]) == (1.0, 0.0)
