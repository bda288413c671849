"""A scorer: reward functions in killable child processes, behind an actor."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raygrpo.actors.futures import Handle
from raygrpo.actors.process import log_to
from raygrpo.actors.reward_model import ModelDied, RemoteReward
from raygrpo.algorithm.correctness import answers_of
from raygrpo.config import RewardSection
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import Group, GroupSummary, summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReport:
    """A scorer's answer: a scored group without its tokens.

    ``traceback`` is the first one of a reward that failed. ``extras`` are the columns [G] that
    rewards gave to ``log_extra``. ``late`` names the rewards whose model missed its deadline.
    """

    summary: GroupSummary
    traceback: str | None
    extras: Mapping[str, tuple[Any, ...]]
    late: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLost:
    """A scorer's answer where the model of ``reward`` died: the group is to be scored again."""

    reward: str
    error: str


class ScorerActor:
    """Scores one group at a time; holds one warm child process per reward function."""

    def __init__(self, rewards: Sequence[RewardSection], functions: Mapping[str, bytes]) -> None:
        from raygrpo.config.sections import reward_name
        from raygrpo.rewards.host import RewardHost
        from raygrpo.rewards.loading import reward_models

        timeouts = {reward_name(reward): reward.timeout_s for reward in rewards}
        self._models = {name: RemoteReward(name, timeouts[name]) for name in reward_models(rewards)}
        self._host = RewardHost(rewards, functions, backends=self._models)

    def start(self, log: str | None) -> int:
        """Starts and warms the children; returns this process's id."""
        log_to(log)
        self._host.start()
        return os.getpid()

    def score(
        self, group: Group, trainer_state: TrainerState, models: Mapping[str, Handle]
    ) -> ScoreReport | ModelLost:
        """Scores a group; a failing reward is an errored score, never an exception.

        ``models`` are the reward models' actors, by the names of their rewards.
        """
        started = time.monotonic()
        for name, actor in models.items():
            self._models[name].use(actor)
        try:
            scored = self._host.score(group, trainer_state)
        except ModelDied as died:
            return ModelLost(reward=died.reward, error=died.error)
        texts = [completion.text for completion in group.completions]
        evaluates = group.request.stream == "eval"
        summary = summarise(
            group,
            scored.scores,
            metrics=scored.metrics,
            score_s=time.monotonic() - started,
            reward_s=scored.reward_s,
            answers=answers_of(texts, scored.extras) if evaluates else (),
        )
        return ScoreReport(
            summary=summary,
            traceback=scored.traceback,
            extras=scored.extras,
            late=tuple(name for name, model in self._models.items() if model.is_late),
        )
