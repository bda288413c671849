"""Starts the workers of a rollout pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raygrpo.actors.cluster.colocation import Colocation
from raygrpo.actors.cluster.placement import actor_options, generator_threads, labels_of
from raygrpo.actors.generator import GeneratorActor
from raygrpo.actors.pool.workers import Role, Worker
from raygrpo.actors.process import log_path, spawn
from raygrpo.actors.profiling import ProfileRequest
from raygrpo.actors.reward_model import RewardModelActor
from raygrpo.actors.scorer import ScorerActor
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.config import RewardSection, RunConfig
from raygrpo.engines.base import Engine
from raygrpo.rewards.loading import reward_models


class WorkerFactory:
    """Makes generators, scorers and reward models; each is starting when it is returned.

    ``make_engine(config, threads=, version=)`` runs in the generator's process, in place of the
    engine that the configuration names.
    """

    def __init__(
        self,
        config: RunConfig,
        store: StoreHandle | None,
        rewards: Sequence[RewardSection],
        functions: Mapping[str, bytes],
        *,
        local: bool,
        logs: Path | None = None,
        profile: ProfileRequest | None = None,
        make_engine: Callable[..., Engine] | None = None,
        places: Colocation | None = None,
    ) -> None:
        self._config, self._store = config, store
        self._rewards, self._functions = rewards, functions
        self._local, self._logs, self._profile = local, logs, profile
        self._make_engine, self._places = make_engine, places
        models = reward_models(rewards)
        self._models = [item for item in models.items() for _ in range(item[1].count)]

    def forget_weights(self) -> None:
        """Has the store drop its versions, which are corrupt."""
        assert self._store is not None
        self._store.forget()

    def all(self, role: Role) -> list[Worker]:
        """All workers of a role, as the configuration asks for."""
        config = self._config
        counts: dict[Role, int] = {
            "generator": config.generators.count,
            "scorer": config.scorers.count,
            "reward_model": len(self._models),
        }
        return [self.make(role, index) for index in range(counts[role])]

    def make(self, role: Role, index: int) -> Worker:
        """A worker of a role: the first, or one in place of another."""
        make = {
            "generator": self._generator,
            "scorer": self._scorer,
            "reward_model": self._reward_model,
        }[role]
        worker = make(index)
        worker.starting = worker.actor.start.remote(log_path(self._logs, worker.name))
        worker.deadline = time.monotonic() + self._config.ray.timeouts_s.start
        return worker

    def _generator(self, index: int) -> Worker:
        config = self._config
        threads = generator_threads(config)
        options = actor_options(
            local=self._local,
            threads=threads,
            gpus=config.ray.gpus.generator,
            labels=labels_of(config, "generator"),
        )
        options |= self._places.options(index) if self._places else {}
        profile = self._profile if index == 0 else None
        actor = spawn(
            GeneratorActor,
            config,
            self._store,
            threads,
            profile,
            self._make_engine,
            max_concurrency=10_000,
            **options,
        )
        return Worker("generator", f"generator-{index}", actor)

    def _scorer(self, index: int) -> Worker:
        labels = labels_of(self._config, "scorer")
        options = actor_options(local=self._local, threads=1, labels=labels)
        actor = spawn(ScorerActor, self._rewards, self._functions, **options)
        return Worker("scorer", f"scorer-{index}", actor)

    def _reward_model(self, index: int) -> Worker:
        reward, params = self._models[index]
        options = actor_options(local=self._local, threads=params.threads, gpus=params.gpus)
        actor = spawn(RewardModelActor, params, **options)
        worker = Worker("reward_model", f"reward-model-{index}", actor, reward=reward)
        worker.living = actor.live.remote()
        return worker
