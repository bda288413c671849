"""Reward models in actors of their own, and what a scorer sees of them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions

from raygrpo.actors.futures import Handle, resolve
from raygrpo.actors.process import keep_heap, log_to
from raygrpo.errors import WorkerDied
from raygrpo.rewards.contract import Call, Reply
from raygrpo.rewards.params import RewardModelParams
from raygrpo.rewards.values import read_values


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """The logits of a group's completions, and how many of them had to be cut."""

    rewards: list[float]
    num_cut: int


class ModelDied(Exception):
    """The process of a reward model is gone; the group is to be scored again."""

    def __init__(self, reward: str, error: str) -> None:
        super().__init__(reward, error)
        self.reward = reward
        self.error = error


class RewardModelActor:
    """Hosts one model; calls that come while it computes are computed together next."""

    def __init__(self, params: RewardModelParams) -> None:
        os.environ["OMP_NUM_THREADS"] = str(params.threads)
        self._params = params
        self._waiting: list[tuple[list[list[int]], asyncio.Future[list[float]]]] = []
        self._busy = asyncio.Lock()

    async def start(self, log: str | None) -> int:
        """Loads the model; returns this process's id."""
        log_to(log)
        if not self._params.gpus:
            keep_heap()
        import torch

        from raygrpo.rewards.reward_model import RewardModel

        torch.set_num_threads(self._params.threads)
        self._model = RewardModel(self._params)
        return os.getpid()

    async def live(self) -> None:
        """Never returns: its reference resolves when this process dies."""
        await asyncio.Event().wait()

    async def score(self, prompt: Any, completions: Sequence[Any]) -> ModelScores:
        """The rewards of a group."""
        sequences, num_cut = self._model.encode(prompt, completions)
        done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((sequences, done))
        async with self._busy:
            if not done.done():
                await self._score_waiting()
        return ModelScores(rewards=await done, num_cut=num_cut)

    async def _score_waiting(self) -> None:
        calls, self._waiting = self._waiting, []
        flat = [ids for sequences, _ in calls for ids in sequences]
        try:
            rewards = await asyncio.to_thread(self._model.score, flat)
        except Exception as error:  # of the whole batch, so each of its calls is told
            for _, done in calls:
                done.set_exception(error)
            return
        for sequences, done in calls:
            done.set_result(rewards[: len(sequences)])
            rewards = rewards[len(sequences) :]


class RemoteReward:
    """A reward model as a scorer's `RewardBackend`: each group is sent to the actor given to `use`.

    A deadline that passes is an errored group, and is noted in ``is_late``; so is what the model
    raises. The actor's death is raised by the call, as `ModelDied`.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name = name
        self.is_late = False
        self._model: Handle = None
        self._timeout_s = timeout_s

    def use(self, model: Handle) -> None:
        """Sends the next group to this actor."""
        self._model = model
        self.is_late = False

    def start(self) -> None:
        """Does nothing: the pool starts the actors."""

    def close(self) -> None:
        """Does nothing: the pool ends the actors."""

    def call(self, call: Call) -> Reply:
        """Scores a group."""
        started = time.monotonic()
        reply = self._ask(call, self._model)
        return replace(reply, seconds=time.monotonic() - started)

    def _ask(self, call: Call, model: Handle) -> Reply:
        size = len(call.completions)
        ref = model.score.remote(call.prompt, call.completions)
        ready, _ = ray.wait([ref], timeout=self._timeout_s)
        if not ready:
            self.is_late = model is self._model  # not of a call that was given up since
            error = f"{self.name}: gave no answer within {self._timeout_s:g} s"
            return Reply.failed(size, error, error)
        try:
            scores: ModelScores = resolve(ref, self.name)
        except WorkerDied as error:
            raise ModelDied(self.name, error.message) from None
        except Exception as error:  # whatever the model raised is an errored group
            return Reply.failed(size, f"{self.name}: raised: {_last_line(error)}", str(error))
        parts, errors = read_values(self.name, scores.rewards, size)
        metrics = {f"rewards/{self.name}/truncated_frac": (scores.num_cut / size,)}
        return Reply(parts=tuple(parts), errors=tuple(errors), metrics=metrics)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
