"""The rollout pool: generators and scorers behind one face, and the driver's one place to wait.

The pool owns the workers, and every group from its submission to its scores:

    submit -> queue -> a generator -> queue -> a scorer -> PoolEvents.groups

    stage       waits for                                 unblocked by
    generate    a generator that is ready and has rows    its start or load, a group that is done
    score       a scorer without a group                  another group's scores
    load        weights in the store                      `RolloutPool.load`, after each publish

The driver owns the references to a generator's answer. So the death of a worker's process costs
only the calls under way: the pool starts a new worker, which loads the newest weights before it
serves, sends the groups again, and reports them as lost. Scoring leaves a copy of the tokens on the
scorer's node: Ray falls back on the copy where the generator's node is preempted. Where both nodes
are gone, the update that needs the tokens fails with AnswerLost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from raygrpo.actors.cluster.nodes import on_draining_nodes
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.futures import Handle, Pending, resolve
from raygrpo.actors.generator import GenerationReport
from raygrpo.actors.pool.dispatch import Dispatcher
from raygrpo.actors.pool.factory import WorkerFactory
from raygrpo.actors.pool.failures import MAX_GROUP_DEATHS, Action, History, decide
from raygrpo.actors.pool.workers import Flight, GroupKey, PoolEvents, Worker
from raygrpo.actors.scorer import ModelLost, ScoreReport
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.algorithm.step_plan import teaches
from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.errors import (
    DependencyDied,
    EngineBroken,
    InfraError,
    ProbeFailed,
    WeightsCorrupt,
    WeightsLost,
    WorkerDied,
)
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import FinishedGroup, GroupRequest, Ref, Stream

# A generator that leaves has this long to hand over what it wrote, and as long to copy the tokens.
_ABORT_S = 15.0
_DRAIN_CHECK_S, _COPY_S = 2.0, 1.0


class RolloutPool:
    """Keeps the workers alive, and the groups moving through them: see `Dispatcher`.

    Attributes:
        generators: the generators as they are now, by number.
        normal_gap: the probe's gap of the run's first version, in nats; None until it is measured.
    """

    def __init__(
        self,
        config: RunConfig,
        store: StoreHandle | None,
        functions: Mapping[str, bytes],
        site: Site,
        make_engine: Callable[..., Engine] | None = None,
    ) -> None:
        """The arguments are those of `WorkerFactory`."""
        self._config, self._store, self._local = config, store, site.local
        self._factory = WorkerFactory(config, store, functions, site, make_engine)
        self.generators = self._factory.all("generator")
        self._scorers = self._factory.all("scorer")
        self._models = self._factory.all("reward_model")
        # A deterministic engine decodes one group at a time.
        max_rows = 1 if config.deterministic else config.generators.max_rows
        self._dispatcher = Dispatcher(config.ray.timeouts_s.generate, max_rows)
        self._flights = self._dispatcher.flights
        self._num_publishes = 0
        self._sleeping = False
        self._deaths_in_a_row = 0
        self._drains_checked = 0.0
        self._happened = PoolEvents()
        self.normal_gap: float | None = None

    @property
    def _workers(self) -> tuple[Worker, ...]:
        return (*self.generators, *self._scorers, *self._models)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers that have started, by name."""
        return {worker.name: worker.pid for worker in self._workers}

    def start(self, normal_gap: float | None) -> None:
        """Waits until every worker has started; raises what the first failing one raised.

        ``normal_gap`` is the probe's gap of the run's first version, where an earlier start of the
        run measured it.
        """
        self.normal_gap = normal_gap
        start_s = self._config.ray.timeouts_s.start
        for worker in self._workers:
            worker.pid = Pending(worker.name, [worker.starting], start_s, lambda v: v[0]).wait()
            worker.starting = None

    def take_idle_frac(self) -> float | None:
        """The share of time, since the last call, in which generators had nothing to decode: their
        mean. None until a generator has reported twice."""
        shares = [worker.idle.take() for worker in self.generators]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if known else None

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            ray.kill(worker.actor)

    def submit(self, request: GroupRequest) -> None:
        """Queues a group to generate."""
        self._dispatcher.submit(request)
        self._dispatcher.generate(self.generators)

    def forget(self, stream: Stream) -> None:
        """Drops every group of a stream; nothing more is heard of them."""
        self._dispatcher.forget(stream)

    def receivers(self) -> dict[str, Handle]:
        """The generators that can take a version directly now, by the names of their processes."""
        return {worker.process: worker.actor for worker in self.generators if worker.can_receive}

    def load(self, broken: Mapping[str, str] = {}) -> None:
        """Has every generator load the newest weights; a generator that fails is replaced.

        A generator whose load is under way loads again afterwards. ``broken`` receivers, with the
        reason, may be half-loaded and are replaced. They count as one death, since the receivers of
        a transfer wait for the one that fails.
        """
        lost = [worker for worker in self.generators if worker.process in broken]
        for worker in lost[:1]:
            self._count_death(worker, InfraError(broken[worker.process]))
        for worker in lost:
            self._replace(worker, broken[worker.process])
        self._num_publishes += 1
        self._sleeping = False
        for worker in self.generators:
            if worker.starting is None and worker.loading is None:
                self._start_loading(worker)

    def sleep(self) -> bool:
        """Has generators give the learner their devices until `load`; returns whether all have."""
        self._sleeping = True
        for worker in self.generators:
            if not worker.asleep and worker.starting is None and worker.loading is None:
                self._start_loading(worker)
        return all(worker.asleep for worker in self.generators)

    def wait(
        self, pendings: Sequence[Pending[Any]], timeout_s: float, trainer_state: TrainerState
    ) -> PoolEvents:
        """Blocks until something happens or the time is over, and handles all that has happened.

        ``trainer_state`` is what rewards are told of the run.

        Raises:
            RayGrpoError: a failure that ends the run, in the pool or in one of ``pendings``.
        """
        refs = self._refs() + [ref for pending in pendings for ref in pending.open_refs]
        started = time.monotonic()
        ready = _wait_for(refs, timeout_s)
        self._happened.waited_s = time.monotonic() - started
        self._happened.completed = [pending for pending in pendings if pending.collect(ready)]
        for worker in self._workers:
            self._collect_worker(worker, ready)
        for key, flight in list(self._flights.items()):
            if flight.ref is not None and flight.ref in ready:
                self._collect_flight(key, flight)
        self._check_deadlines()
        self._check_drains()
        self._replace_left()
        self._dispatcher.generate(self.generators)
        self._dispatcher.score(self._scorers, self._models, trainer_state)
        happened, self._happened = self._happened, PoolEvents()
        return happened

    def _note(self, kind: str, /, **fields: Any) -> None:
        self._happened.events.append((kind, fields))

    def _refs(self) -> list[Ref]:
        workers = [
            ref
            for worker in self._workers
            for ref in (worker.starting, worker.loading, worker.living)
            if ref is not None
        ]
        return workers + [f.ref for f in self._flights.values() if f.ref is not None]

    def _start_loading(self, worker: Worker) -> None:
        """Has a generator load the newest weights, or sleep while that is the order."""
        if worker.leaving:
            return
        sleep, load = worker.actor.sleep, worker.actor.load
        worker.loading = sleep.remote() if self._sleeping else load.remote(self.normal_gap)
        worker.asleep = False
        worker.loading_publish = self._num_publishes
        worker.deadline = time.monotonic() + self._config.ray.timeouts_s.sync

    def _collect_worker(self, worker: Worker, ready: set[Ref]) -> None:
        try:
            if worker.starting is not None and worker.starting in ready:
                worker.pid = resolve(worker.starting, worker.name)
                worker.starting = None
                if worker.role == "generator" and self._num_publishes:
                    worker.joining = True
                    self._start_loading(worker)
            elif worker.loading is not None and worker.loading in ready:
                self._collect_load(worker)
            elif worker.living is not None and worker.living in ready:
                resolve(worker.living, worker.name)
        except DependencyDied:
            raise
        except InfraError as error:
            if isinstance(error, ProbeFailed):
                self._note("probe_failed", worker=worker.name, **error.figures)
            elif isinstance(error, WeightsCorrupt):
                self._forget_weights(worker, error)
            self._bury(worker, error)

    def _collect_load(self, worker: Worker) -> None:
        ref, worker.loading = worker.loading, None
        newest = worker.loading_publish == self._num_publishes
        try:
            report = resolve(ref, worker.name)
            if report is None:
                worker.asleep = newest
            else:
                self._happened.loads.append(report)
                if self.normal_gap is None:
                    self.normal_gap = report.probe_gap
                worker.idle.update(report.idle)
                worker.joining = worker.joining and not newest
        except WeightsLost as error:  # not the generator's fault: it keeps the weights that it has
            if newest:
                self._happened.weights_lost = True
                self._note("weights_lost", worker=worker.name, error=str(error))
        if not newest:
            self._start_loading(worker)

    def _forget_weights(self, worker: Worker, error: WeightsCorrupt) -> None:
        """Has the learner publish all weights again, unless newer ones have come meanwhile."""
        if worker.loading_publish == self._num_publishes:
            assert self._store is not None
            self._store.forget()  # its versions are corrupt
            self._happened.weights_lost = True
        self._note("weights_corrupt", worker=worker.name, error=str(error))

    def _collect_flight(self, key: GroupKey, flight: Flight) -> None:
        worker = flight.worker
        assert worker is not None
        if key not in worker.groups:
            return
        try:
            answer = resolve(flight.ref, worker.name)
        except Exception as error:
            self._fail_flight(key, flight, error)
            return
        self._dispatcher.answered(key)
        if isinstance(answer, GenerationReport):
            if answer.idle is not None:
                worker.idle.update(answer.idle)
            if answer.aborted_tokens is None:
                self._dispatcher.to_score(key, answer)
            else:
                self._take_aborted(key, worker, answer.aborted_tokens)
            return
        if isinstance(answer, ModelLost):
            self._bury(flight.models[answer.reward], InfraError(answer.error))
            self._give_back(key)
            return
        self._finish(key, flight, answer)

    def _finish(self, key: GroupKey, flight: Flight, report: ScoreReport) -> None:
        self._deaths_in_a_row = 0
        self._dispatcher.drop(key)
        for reward in report.late:
            late = InfraError(f"no answer within the timeout_s of reward {reward}")
            self._bury(flight.models[reward], late)
        group = FinishedGroup(
            summary=report.summary,
            payload=flight.payload,
            teaches=teaches(report.summary, self._config),
            extras=report.extras,
            traceback=report.traceback,
        )
        self._happened.groups.append(group)

    def _fail_flight(self, key: GroupKey, flight: Flight, error: Exception) -> None:
        worker = flight.worker
        assert worker is not None
        if isinstance(error, WorkerDied | EngineBroken):
            self._bury(worker, error)
            return
        action = decide(error, self._history(attempts=flight.request.attempt + 1))
        if action is Action.STOP:
            raise error
        if action is Action.DROP_GROUP:
            self._drop(key, str(error))
        else:
            self._note("group_lost", stream=key[0], group_id=key[1], error=str(error))
            self._send_again(key)

    def _bury(self, worker: Worker, error: Exception) -> None:
        """Replaces a worker that died; see `_give_back` for its groups."""
        if worker in self._workers:
            self._count_death(worker, error)
            self._replace(worker, str(error))

    def _count_death(self, worker: Worker, error: Exception) -> None:
        """Counts a death, unless the worker was told to leave.

        Raises:
            InfraError: too many workers have died.
        """
        if worker.leaving:
            return
        if decide(error, self._history(worker_died=True)) is Action.STOP:
            raise InfraError(
                f"{self._deaths_in_a_row} workers died in a row, the last was {worker.name}: "
                f"{error}",
                "see logs/ for the reason (out of memory is the usual one)",
            ) from error
        self._deaths_in_a_row += 1

    def _history(self, *, worker_died: bool = False, attempts: int = 0) -> History:
        return History(
            worker_died=worker_died,
            attempts=attempts,
            deaths_in_a_row=self._deaths_in_a_row,
            num_workers=len(self._workers),
        )

    def _replace(self, worker: Worker, reason: str) -> None:
        ray.kill(worker.actor)
        lost = sorted(worker.groups)
        worker.groups.clear()
        for key in lost:
            self._give_back(key)
        groups = [list(key) for key in lost]
        self._note("worker_replaced", worker=worker.name, groups=groups, error=reason)
        pool = next(p for p in (self.generators, self._scorers, self._models) if worker in p)
        index = pool.index(worker)
        pool[index] = self._factory.make(worker.role, index)

    def _give_back(self, key: GroupKey) -> None:
        """Sends a dead worker's group again, unless the group itself seems to kill workers.

        A generated group is scored again; another one is generated again, from its start.
        """
        flight = self._flights[key]
        flight.ref = flight.worker = None
        if flight.report is not None:
            flight.scorer_deaths += 1
        deaths = flight.scorer_deaths if flight.report else flight.request.attempt + 1
        if deaths >= MAX_GROUP_DEATHS:
            self._drop(key, f"{deaths} workers died while they had it")
        elif flight.report is not None:
            self._dispatcher.to_score(key, flight.report)
        else:
            self._send_again(key)

    def _send_again(self, key: GroupKey) -> None:
        self._count_aborted(key, self._flights[key].kept_tokens)
        self._dispatcher.send_again(key)
        self._happened.lost.append(key)

    def _drop(self, key: GroupKey, reason: str) -> None:
        self._count_aborted(key, self._dispatcher.drop(key).kept_tokens)
        self._happened.dropped.append(key)
        self._note("group_dropped", stream=key[0], group_id=key[1], error=reason)

    def _count_aborted(self, key: GroupKey, num_tokens: int) -> None:
        if key[0] == "train":
            self._happened.aborted_tokens += num_tokens

    def _take_aborted(self, key: GroupKey, worker: Worker, num_tokens: int) -> None:
        """A generator that leaves gave a group back: another generator goes on with the group."""
        if not worker.leaving:  # the pool did not ask the generator to leave
            self.retire(worker, "it was told to end (SIGTERM)")
        kept = 0 if self._config.deterministic else num_tokens
        self._count_aborted(key, num_tokens - kept)
        self._dispatcher.resume(key, kept)

    def retire(self, worker: Worker, reason: str) -> None:
        """Replaces a generator that still answers, once the generator has given its groups back."""
        worker.leaving = reason
        worker.deadline = time.monotonic() + _ABORT_S
        worker.actor.abort.remote()
        num_groups = len(worker.groups)
        self._note("worker_leaving", worker=worker.name, groups=num_groups, reason=reason)

    def _replace_left(self) -> None:
        left = [worker for worker in self.generators if worker.leaving and not worker.groups]
        copied = not left or self._dispatcher.copied(_COPY_S)
        for worker in left:
            if copied or time.monotonic() > worker.deadline + _ABORT_S:
                self._replace(worker, worker.leaving)

    def _check_drains(self) -> None:
        now = time.monotonic()
        if self._local or now < self._drains_checked + _DRAIN_CHECK_S:
            return
        self._drains_checked = now
        for worker in on_draining_nodes([w for w in self.generators if w.ready]):
            self.retire(worker, "its node is drained")

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        late: dict[str, tuple[Worker, str]] = {}
        for worker in self._workers:
            leaving = worker.leaving and worker.groups  # `_replace_left` handles one without groups
            busy = worker.starting is not None or worker.loading is not None or leaving
            if not busy or now <= worker.deadline:
                continue
            if worker.ready and worker.groups:  # a slow load: the generator still decodes
                slow = InfraError(f"{worker.name} missed the deadline of a load")
                self._count_death(worker, slow)
                self.retire(worker, str(slow))
            else:
                late[worker.name] = (worker, worker.leaving or "start or load")
        late |= {worker.name: (worker, what) for worker, what in self._dispatcher.late(now)}
        for worker, what in late.values():
            self._bury(worker, InfraError(f"{worker.name} missed its deadline: {what}"))


def _wait_for(refs: list[Ref], timeout_s: float) -> set[Ref]:
    """What is ready once anything is, or the time is over."""
    if not refs:
        return set()
    ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
    if ready:
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
    return set(ready)
