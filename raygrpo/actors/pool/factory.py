"""Starts the workers of a rollout pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from raygrpo.actors.cluster.placement import labels_of
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.generator import GeneratorActor
from raygrpo.actors.pool.workers import Role, Worker
from raygrpo.actors.process import log_path, spawn
from raygrpo.actors.reward_model import RewardModelActor
from raygrpo.actors.scorer import ScorerActor
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.rewards.loading import reward_models


class WorkerFactory:
    """Makes generators, scorers and reward models; a worker is starting when it is returned.

    ``make_engine(config, threads=, version=)`` runs in the generator's process. It replaces the
    engine that the configuration names. The configuration is a resolved one.
    """

    def __init__(
        self,
        config: RunConfig,
        store: StoreHandle | None,
        functions: Mapping[str, bytes],
        site: Site,
        make_engine: Callable[..., Engine] | None = None,
    ) -> None:
        self._config, self._store, self._site = config, store, site
        self._functions, self._make_engine = functions, make_engine
        models = reward_models(config.rewards)
        self._models = [item for item in models.items() for _ in range(item[1].count)]

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
        """A worker of a role: number ``index``, the first one or its successor."""
        makers = {"generator": self._generator, "scorer": self._scorer}
        worker = makers.get(role, self._reward_model)(index)
        worker.starting = worker.actor.start.remote(log_path(self._site.logs, worker.name))
        worker.deadline = time.monotonic() + self._config.ray.timeouts_s.start
        return worker

    def _generator(self, index: int) -> Worker:
        config, threads = self._config, self._config.ray.threads.generator
        gpus, labels = config.ray.gpus.generator, labels_of(config, "generator")
        options = self._site.options(index, threads=threads, gpus=gpus, labels=labels)
        profile = self._site.profile if index == 0 else None
        arguments = (config, self._store, threads, profile, self._make_engine)
        actor = spawn(GeneratorActor, *arguments, max_concurrency=10_000, **options)
        return Worker("generator", f"generator-{index}", actor)

    def _scorer(self, index: int) -> Worker:
        labels = labels_of(self._config, "scorer")
        options = self._site.options(None, threads=1, labels=labels)
        actor = spawn(ScorerActor, self._config.rewards, self._functions, **options)
        return Worker("scorer", f"scorer-{index}", actor)

    def _reward_model(self, index: int) -> Worker:
        reward, params = self._models[index]
        options = self._site.options(None, threads=params.threads, gpus=params.gpus)
        actor = spawn(RewardModelActor, params, **options)
        worker = Worker("reward_model", f"reward-model-{index}", actor, reward=reward)
        worker.living = actor.live.remote()
        return worker
