"""The rollout store: an actor that writes groups' tokens to Parquet, and the driver's face of it.

The driver hands over summaries, plans and references, never tokens. The driver keeps the references
until the file is on disk, so the writer's death costs no row. A step waits for writes only where
two files are still to be written; `RolloutLog.confirm`, after a write has ended, unblocks it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrpo.actors.futures import Handle, Pending
from raygrpo.actors.process import log_path, log_to, spawn
from raygrpo.config import RunConfig
from raygrpo.errors import InfraError, StorageError
from raygrpo.storage import rollouts as store
from raygrpo.types import FinishedGroup, Group, Ref, StepBatch, Stream

_MAX_WAITING = 2
_MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOrder:
    """The groups of one file, and the step's plan where a step trained them.

    The order's references keep the groups alive until the file is written.
    """

    kind: store.Kind
    facts: store.FileFacts
    groups: tuple[FinishedGroup, ...]
    minibatches: store.Minibatches


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """A written file: the size of all files, a few rows of this one, the groups it had to leave out
    because their tokens are lost."""

    num_bytes: int
    sample: list[dict[str, Any]]
    lost: list[int]


class RolloutWriterActor:
    """Writes files below ``directory``, one at a time."""

    def __init__(self, directory: str, timeout_s: float, log: str | None) -> None:
        log_to(log)
        self._directory = Path(directory)
        self._timeout_s = timeout_s

    def write(self, order: WriteOrder) -> WriteReport:
        """Writes a file; groups whose payload is lost are left out, and the file says so."""
        payloads = [group.payload for group in order.groups]
        ray.wait(payloads, num_returns=len(payloads), timeout=self._timeout_s)
        found = {group.summary.group_id: self._fetch(group.payload) for group in order.groups}
        groups = {group_id: group for group_id, group in found.items() if group is not None}
        lost = sorted(found.keys() - groups.keys())
        table = store.make_table(order.facts.step, order.groups, groups, order.minibatches)
        path = store.file_path(self._directory, order.kind, order.facts.step)
        complete = order.facts.complete and not lost
        store.write_file(path, table, replace(order.facts, complete=complete))
        num_bytes = store.total_bytes(self._directory)
        return WriteReport(num_bytes=num_bytes, sample=store.sample_rows(table), lost=lost)

    def _fetch(self, payload: Ref) -> Group | None:
        try:
            group: Group = ray.get(payload, timeout=self._timeout_s)
        except ray.exceptions.ObjectLostError:
            return None
        return group


class _Attempt(Pending[WriteReport]):
    """One try at a write. The writer's failure is a result: another writer makes the next try."""

    error: InfraError | None = None

    def collect(self, ready: set[Ref]) -> bool:
        """As `Pending.collect`, but a dead or late writer ends the try too."""
        try:
            return super().collect(ready)
        except InfraError as error:
            self.error = error
            return True


class RolloutLog:
    """Takes groups once their fates are decided, and has each step's groups written as one file.

    ``tracking.completions`` bounds the store: it takes only the share ``frac`` of the groups, and
    none once the files have ``max_gb`` (event ``completions_full``). Either at 0 turns the store
    off. ``on_sample(step, rows)`` gets a few rows of each trained step.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        *,
        on_event: Callable[..., None],
        on_sample: Callable[[int, Sequence[dict[str, Any]]], None],
        logs: Path | None = None,
    ) -> None:
        self._directory, self._logs = directory, logs
        self._timeout_s = config.ray.timeouts_s.update
        kept = config.tracking.completions
        self._frac, self._max_bytes = kept.frac, kept.max_gb * 1e9
        self._on_event, self._on_sample = on_event, on_sample
        self._is_on = bool(self._frac and self._max_bytes)
        self._is_full = False
        self._num_bytes = store.total_bytes(directory)
        self._held: dict[Stream, dict[int, FinishedGroup]] = {"train": {}, "eval": {}}
        self._waiting: deque[WriteOrder] = deque()
        self._attempt: _Attempt | None = None
        self._num_attempts = 0  # at the first of them
        self._actor: Handle | None = None
        self._num_rows = self._num_unstored = 0

    @property
    def pendings(self) -> list[Pending[Any]]:
        """The write under way, if any: hand it to `confirm` when it has ended."""
        return [self._attempt] if self._attempt else []

    @property
    def has_room(self) -> bool:
        """Whether another step may start."""
        return len(self._waiting) < _MAX_WAITING

    def settled(self, step: int) -> bool:
        """Whether every group that a checkpoint of ``step`` counts as done is on disk."""
        return all(order.facts.step > step and order.minibatches for order in self._waiting)

    def take(self, decided: Iterable[FinishedGroup]) -> None:
        """Takes groups whose fate is decided; a ``kept`` one waits for the step that trains it."""
        for group in decided if self._is_on else ():
            summary = group.summary
            if self._is_full or not store.is_drawn(summary.stream, summary.group_id, self._frac):
                self._num_unstored += len(summary.lengths)
                continue
            self._held[summary.stream][summary.group_id] = group

    def write_step(self, batch: StepBatch) -> None:
        """Has a step's groups written: those that it trains, and those dropped before it."""
        self._write("step", batch.step + 1, batch)

    def write_rest(self, kind: store.Kind, step: int) -> None:
        """Has groups written that no step trains; a step's own groups may join them in the file."""
        self._write(kind, step, StepBatch(step=step, minibatches=(), payloads={}, versions={}))

    def confirm(self, pending: Pending[Any]) -> None:
        """Takes the outcome of a write, if ``pending`` is one.

        Raises:
            StorageError: a file could not be written, by several writers.
        """
        if pending is not self._attempt or self._attempt is None:
            return
        attempt, self._attempt, order = self._attempt, None, self._waiting[0]
        if attempt.error is not None:
            self._lose_writer(order.facts.step, attempt.error)
        else:
            self._waiting.popleft()
            self._num_attempts = 0
            step, report = order.facts.step, attempt.value
            self._num_bytes = report.num_bytes
            if report.lost:
                self._on_event("completions_lost", step=step, groups=report.lost)
            if order.minibatches:
                self._on_sample(step, report.sample)
        self._send()

    def metrics(self) -> dict[str, float]:
        """Completions that the store took and left out since the last call."""
        counts = {"num_rows": self._num_rows, "num_unstored": self._num_unstored}
        self._num_rows = self._num_unstored = 0
        named = {f"completions_store/{name}": float(count) for name, count in counts.items()}
        return named if self._is_on else {}

    def close(self) -> None:
        """Ends the writer."""
        if self._actor is not None:
            ray.kill(self._actor)

    def _write(self, kind: store.Kind, step: int, batch: StepBatch) -> None:
        held = self._held["train" if kind == "step" else "eval"]
        ids = [i for i, group in held.items() if group.fate != "kept" or i in batch.payloads]
        groups = tuple(held.pop(group_id) for group_id in ids)
        num_rows = sum(len(group.summary.lengths) for group in groups)
        if groups and not self._is_full and self._num_bytes >= self._max_bytes:
            self._is_full = True
            self._on_event("completions_full", step=step, num_bytes=self._num_bytes)
        if self._is_full or not groups:
            self._num_unstored += num_rows
            return
        self._num_rows += num_rows
        facts = store.FileFacts(
            step=step,
            complete=self._frac >= 1,
            num_minibatches=len(batch.minibatches),
            has_signal=batch.has_signal,
        )
        order = WriteOrder(kind=kind, facts=facts, groups=groups, minibatches=batch.minibatches)
        self._waiting.append(order)
        self._send()

    def _send(self) -> None:
        if self._attempt is not None or not self._waiting:
            return
        self._num_attempts += 1
        self._actor = self._actor or self._new_writer()
        ref = self._actor.write.remote(self._waiting[0])
        self._attempt = _Attempt("rollout-writer", [ref], self._timeout_s, lambda values: values[0])

    def _new_writer(self) -> Handle:
        # The run directory is sure to be there only on the driver's node.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        arguments = (str(self._directory), self._timeout_s, log_path(self._logs, "rollout-writer"))
        return spawn(RolloutWriterActor, *arguments, num_cpus=0, scheduling_strategy=node)

    def _lose_writer(self, step: int, error: InfraError) -> None:
        if self._num_attempts >= _MAX_ATTEMPTS:
            raise StorageError(
                f"{self._num_attempts} writers failed at the completions of step {step}: {error}",
                "see logs/ for the reason (out of memory is the usual one)",
            ) from error
        ray.kill(self._actor)
        self._actor = None
        fields = {"worker": "rollout-writer", "groups": [], "error": str(error)}
        self._on_event("worker_replaced", step=step, **fields)


def put_groups(groups: Mapping[int, Group]) -> dict[int, Ref]:
    """References to groups, as a step's payloads are."""
    return {group_id: ray.put(group) for group_id, group in groups.items()}
