"""Which worker gets which group: the queues of groups, and who has what."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray

from raygrpo.actors.generator import GenerationReport
from raygrpo.actors.workers import Flight, GroupKey, Worker, choose_models, least_loaded
from raygrpo.types import Group, GroupRequest


class Dispatcher:
    """Sends groups to the least loaded ready generator, then to the least loaded scorer.

    Attributes:
        flights: the groups under way, those in a queue included.
    """

    def __init__(self, group_timeout_s: float) -> None:
        self._group_timeout_s = group_timeout_s
        self._queue: deque[GroupKey] = deque()
        self._to_score: deque[GroupKey] = deque()
        self.flights: dict[GroupKey, Flight] = {}

    def submit(self, order: GroupRequest | Group) -> None:
        """Queues a group to generate, or one made elsewhere that is only to be scored."""
        request = order.request if isinstance(order, Group) else order
        key = (request.stream, request.group_id)
        self.flights[key] = flight = Flight(request=request)
        if isinstance(order, Group):
            flight.payload = ray.put(order)
            self.to_score(key, GenerationReport(group_id=request.group_id))
        else:
            self._queue.append(key)

    def to_score(self, key: GroupKey, report: GenerationReport) -> None:
        """Queues a generated group for its scorer."""
        self.flights[key].report = report
        self._to_score.append(key)

    def answered(self, key: GroupKey) -> None:
        """A group's call came to its end: its worker goes on with the next ones."""
        flight = self.flights[key]
        worker = flight.worker
        assert worker is not None
        worker.groups.discard(key)
        flight.ref = flight.worker = None
        for other in worker.groups:  # a deadline is one of progress: waiting in line is no fault
            self.flights[other].deadline = self._deadline()

    def generate(self, generators: Sequence[Worker]) -> None:
        """Hands out groups to generate, as far as generators are ready."""
        while self._queue and (worker := least_loaded(generators)):
            key = self._queue.popleft()
            flight = self.flights.get(key)
            if flight is None:
                continue
            flight.ref, flight.payload = worker.actor.generate.options(num_returns=2).remote(
                flight.request
            )
            self._assign(key, flight, worker)

    def score(self, scorers: Sequence[Worker], models: Sequence[Worker], state: Any) -> None:
        """Hands out groups to score; ``state`` is what rewards are told of the run."""
        while self._to_score and (worker := least_loaded(scorers)):
            chosen = choose_models(models, turn=self._to_score[0][1])
            if chosen is None:
                return
            key = self._to_score.popleft()
            flight = self.flights[key]
            flight.models = chosen
            actors = {reward: model.actor for reward, model in chosen.items()}
            flight.ref = worker.actor.score.remote(flight.payload, state, actors)
            self._assign(key, flight, worker)

    def late(self, now: float) -> list[tuple[Worker, str]]:
        """Workers that had a group for longer than its deadline allows."""
        return [
            (flight.worker, f"group {flight.request.group_id}")
            for flight in self.flights.values()
            if flight.worker is not None and now > flight.deadline
        ]

    def _assign(self, key: GroupKey, flight: Flight, worker: Worker) -> None:
        flight.worker = worker
        flight.deadline = self._deadline()
        worker.groups.add(key)

    def _deadline(self) -> float:
        return time.monotonic() + self._group_timeout_s
