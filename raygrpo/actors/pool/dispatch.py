"""Which worker gets which group: the two queues, and the groups that each worker has."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import ray

from raygrpo.actors.generator import GenerationReport
from raygrpo.actors.pool.workers import Flight, GroupKey, Worker, choose_models, least_loaded
from raygrpo.rewards.contract import TrainerState
from raygrpo.types import GroupRequest, Stream


class Dispatcher:
    """Sends each group to the generator with the fewest tokens in flight, then to a free scorer.

    A group that no worker has room for waits in a queue (see `least_loaded`). The tokens of a group
    are counted at most: the prompt, and ``max_tokens`` for each completion. All groups of a run
    have the same limits, so a better guess at the lengths would not change the choice.

    Attributes:
        flights: the groups under way, those in a queue included.
    """

    def __init__(self, group_timeout_s: float, max_rows: int) -> None:
        self._group_timeout_s = group_timeout_s
        self._max_rows = max_rows
        self._queue: list[tuple[bool, int, GroupKey]] = []
        self._num_queued = 0
        self._to_score: deque[GroupKey] = deque()
        self.flights: dict[GroupKey, Flight] = {}

    def submit(self, request: GroupRequest) -> None:
        """Queues a group to generate."""
        key = (request.stream, request.group_id)
        self.flights[key] = Flight(request=request)
        self._enqueue(key, again=False)

    def send_again(self, key: GroupKey) -> None:
        """Queues a group from its start, as the next attempt, before all others."""
        request = self.drop(key).request
        self.flights[key] = Flight(request=replace(request, attempt=request.attempt + 1))
        self._enqueue(key, again=True)

    def forget(self, stream: Stream) -> None:
        """Drops every group of a stream."""
        self._queue = [entry for entry in self._queue if entry[-1][0] != stream]
        heapq.heapify(self._queue)
        self._to_score = deque(key for key in self._to_score if key[0] != stream)
        for key in [key for key in self.flights if key[0] == stream]:
            self.drop(key)

    def _enqueue(self, key: GroupKey, *, again: bool) -> None:
        # Steps take groups in order, so those that came after a group may wait for it.
        self._num_queued += 1
        heapq.heappush(self._queue, (not again, key[1] if again else self._num_queued, key))

    def to_score(self, key: GroupKey, report: GenerationReport) -> None:
        """Queues a generated group for its scorer."""
        flight = self.flights[key]
        flight.report, flight.partials, flight.kept_tokens = report, (), 0
        self._to_score.append(key)

    def resume(self, key: GroupKey, kept_tokens: int) -> None:
        """Queues an aborted group for another generator, before all others: to go on from its
        ``kept_tokens`` tokens, or from its start where there are none."""
        flight = self.flights[key]
        flight.partials = flight.payload if kept_tokens else ()
        flight.kept_tokens, flight.payload = kept_tokens, None
        self._enqueue(key, again=True)

    def copied(self, timeout_s: float) -> bool:
        """Copies all written tokens to this node; returns whether all are here. A drained node ends
        as soon as nobody works on it, and takes along the tokens that only it holds."""
        flights = self.flights.values()
        refs = [flight.payload for flight in flights if flight.report is not None]
        refs += [flight.partials for flight in flights if flight.kept_tokens]
        waiting = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[1] if refs else []
        return not waiting

    def drop(self, key: GroupKey) -> Flight:
        """Forgets a group."""
        flight = self.flights.pop(key)
        if flight.worker is not None:
            self._release(key, flight, flight.worker)
        return flight

    def answered(self, key: GroupKey) -> None:
        """A group's call has ended: the worker goes on with its next groups."""
        flight = self.flights[key]
        worker = flight.worker
        assert worker is not None
        self._release(key, flight, worker)
        for other in worker.groups:  # a deadline is one of progress: a wait in line is no fault
            self.flights[other].deadline = self._deadline()

    def generate(self, generators: Sequence[Worker]) -> None:
        """Hands out groups to generate, while a generator has room."""
        while self._queue:
            key = self._queue[0][-1]
            flight = self.flights[key]
            worker = least_loaded(generators, flight.num_rows, self._max_rows, len(self._queue))
            if worker is None:
                return
            heapq.heappop(self._queue)
            flight.ref, flight.payload = worker.actor.generate.options(num_returns=2).remote(
                flight.request, flight.partials
            )
            self._assign(key, flight, worker, flight.num_rows, flight.max_tokens)

    def score(
        self, scorers: Sequence[Worker], models: Sequence[Worker], state: TrainerState
    ) -> None:
        """Hands out groups to score, while a scorer is free; rewards are told the ``state``."""
        while self._to_score and (worker := least_loaded(scorers, 1, 1, len(self._to_score))):
            chosen = choose_models(models, turn=self._to_score[0][1])
            if chosen is None:
                return
            key = self._to_score.popleft()
            flight = self.flights[key]
            flight.models = chosen
            actors = {reward: model.actor for reward, model in chosen.items()}
            flight.ref = worker.actor.score.remote(flight.payload, state, actors)
            self._assign(key, flight, worker, 1, 1)

    def late(self, now: float) -> list[tuple[Worker, str]]:
        """Workers that have made no progress with a group within its deadline, and the group."""
        return [
            (flight.worker, f"group {flight.request.group_id}")
            for flight in self.flights.values()
            if flight.worker is not None and now > flight.deadline
        ]

    def _assign(
        self, key: GroupKey, flight: Flight, worker: Worker, num_rows: int, load: int
    ) -> None:
        flight.worker, flight.share = worker, (num_rows, load)
        flight.deadline = self._deadline()
        worker.groups.add(key)
        worker.num_rows += num_rows
        worker.load += load

    def _release(self, key: GroupKey, flight: Flight, worker: Worker) -> None:
        worker.groups.discard(key)
        worker.num_rows -= flight.share[0]
        worker.load -= flight.share[1]
        flight.ref = flight.worker = None

    def _deadline(self) -> float:
        return time.monotonic() + self._group_timeout_s
