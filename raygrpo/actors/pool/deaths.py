"""How many workers were lost in a row, and what a failure leads to after those."""

from __future__ import annotations

from collections.abc import Callable

from raygrpo.actors.futures import WorkerDied
from raygrpo.actors.pool.failures import Action, History, decide
from raygrpo.actors.pool.workers import Flight, Worker
from raygrpo.errors import EngineBroken, InfraError


class Losses:
    """Counts losses since the last group finished, in a pool of ``num_workers()``."""

    def __init__(self, num_workers: Callable[[], int]) -> None:
        self._num_workers = num_workers
        self._in_a_row = 0

    def forget(self) -> None:
        """A group finished: starting workers again helps."""
        self._in_a_row = 0

    def decide(self, error: Exception, worker: Worker, flight: Flight) -> Action:
        """What the failure of a group's call leads to."""
        died = isinstance(error, WorkerDied | EngineBroken)
        history = self._history(flight.request.attempt + 1)
        return decide(error, worker.role, history, worker_died=died)

    def count(self, worker: Worker, error: Exception) -> None:
        """Counts a worker that is to be replaced, unless it was when it was told to leave.

        Raises:
            InfraError: too many were lost.
        """
        if worker.leaving:
            return
        if decide(error, worker.role, self._history(), worker_died=True) is Action.STOP:
            raise InfraError(
                f"{self._in_a_row} workers were lost in a row, the last was {worker.name}: {error}",
                "see logs/ for the reason (out of memory is the usual one)",
            ) from error
        self._in_a_row += 1

    def _history(self, attempts: int = 0) -> History:
        return History(
            attempts=attempts,
            consecutive_losses=self._in_a_row,
            num_workers=self._num_workers(),
        )
