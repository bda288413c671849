"""The rollout store: an actor that writes groups' tokens to Parquet, and the driver's face of it.

The driver hands over summaries, plans and references, never tokens. It keeps the references until
their file is on disk, so the writer's death costs no row; no step waits for a write, unless two
files are still to be written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from raygrpo.actors.futures import Pending
from raygrpo.actors.spawn import log_path, log_to, spawn
from raygrpo.config import RunConfig
from raygrpo.errors import InfraError, StorageError
from raygrpo.rollouts import (
    FileFacts,
    Kind,
    Minibatches,
    StoredGroup,
    file_path,
    is_drawn,
    make_table,
    sample_rows,
    total_bytes,
    write_file,
)
from raygrpo.types import Group, StepBatch, Stream

if TYPE_CHECKING:  # importing it loads torch, which the writer's process does without
    from raygrpo.algorithm.window import FinishedGroup

_MAX_WAITING = 2
_MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOrder:
    """One file's groups, with the step's plan where they were trained."""

    kind: Kind
    facts: FileFacts
    groups: tuple[StoredGroup, ...]
    minibatches: Minibatches = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """A file on disk: the size of all, a few of its rows, and the groups whose tokens are lost."""

    num_bytes: int
    sample: tuple[dict[str, Any], ...]
    lost: tuple[int, ...]


class RolloutWriterActor:
    """Writes files below ``directory``, one at a time."""

    def __init__(self, directory: str, timeout_s: float, log: str | None) -> None:
        log_to(log)
        self._directory = Path(directory)
        self._timeout_s = timeout_s

    def write(self, order: WriteOrder, payloads: Sequence[Any]) -> WriteReport:
        """Writes a file; groups whose payload is lost are left out, and the file says so."""
        ids = [stored.summary.group_id for stored in order.groups]
        found = zip(ids, self._fetch(payloads), strict=True)
        groups = {group_id: group for group_id, group in found if group is not None}
        table = make_table(order.facts.step, order.groups, groups, order.minibatches)
        lost = tuple(group_id for group_id in ids if group_id not in groups)
        path = file_path(self._directory, order.kind, order.facts.step)
        write_file(path, table, replace(order.facts, complete=order.facts.complete and not lost))
        return WriteReport(
            num_bytes=total_bytes(self._directory), sample=tuple(sample_rows(table)), lost=lost
        )

    def _fetch(self, payloads: Sequence[Any]) -> list[Group | None]:
        try:
            groups: list[Group | None] = ray.get(list(payloads), timeout=self._timeout_s)
            return groups
        except ray.exceptions.ObjectLostError:
            return [_fetch_one(payload, self._timeout_s) for payload in payloads]


def _fetch_one(payload: Any, timeout_s: float) -> Group | None:
    try:
        group: Group = ray.get(payload, timeout=timeout_s)
    except ray.exceptions.ObjectLostError:
        return None
    return group


class _Attempt(Pending[WriteReport]):
    """One try at a write. That the writer fails is a result: the next try has another writer."""

    error: InfraError | None = None

    def collect(self, ready: set[Any]) -> bool:
        """As `Pending.collect`, but a dead or late writer completes it too."""
        try:
            return super().collect(ready)
        except InfraError as error:
            self.error = error
            return True


@dataclass(slots=True)
class _Write:
    """A file still to be written."""

    order: WriteOrder
    payloads: list[Any]
    attempts: int = 0


class RolloutLog:
    """Takes groups as their fate is decided, and has each step's written as one file.

    Only the share ``tracking.completions_frac`` of the groups is taken, and nothing once the files
    have ``tracking.completions_max_gb`` (event ``completions_full``); with either at 0 the store is
    off. ``on_sample(step, rows)`` gets a few rows of each file.
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
        self._timeout_s = config.ray.update_timeout_s
        self._frac = config.tracking.completions_frac
        self._max_bytes = config.tracking.completions_max_gb * 1e9
        self._on_event, self._on_sample = on_event, on_sample
        self._is_on = bool(self._frac and self._max_bytes)
        self._num_bytes = total_bytes(directory)
        self._is_full = False
        self._held: dict[Stream, dict[int, tuple[StoredGroup, Any]]] = {"train": {}, "eval": {}}
        self._waiting: deque[_Write] = deque()
        self._attempt: _Attempt | None = None
        self._actor: Any = None
        self._num_rows = self._num_unstored = 0

    @property
    def pendings(self) -> list[Pending[Any]]:
        """What to wait for; each that completes goes to `confirm`."""
        return [self._attempt] if self._attempt else []

    @property
    def has_room(self) -> bool:
        """Whether another step may start."""
        return len(self._waiting) < _MAX_WAITING

    def settled(self, step: int) -> bool:
        """Whether all that a checkpoint of ``step`` counts as done is on disk."""
        return all(w.order.facts.step > step and w.order.minibatches for w in self._waiting)

    def take(self, decided: Iterable[tuple[FinishedGroup, str]]) -> None:
        """Takes groups with their fates; those ``kept`` wait for the step that trains them."""
        for group, fate in decided if self._is_on else ():
            summary = group.summary
            if self._is_full or not is_drawn(summary.stream, summary.group_id, self._frac):
                self._num_unstored += len(summary.lengths)
                continue
            stored = StoredGroup(summary=summary, fate=fate, extras=group.extras)
            self._held[summary.stream][summary.group_id] = (stored, group.payload)

    def write_step(self, batch: StepBatch) -> None:
        """Writes the groups that a step trains, and those dropped before it."""
        self._write("step", batch.step + 1, batch)

    def write_rest(self, kind: Kind, step: int) -> None:
        """Writes the groups that no step will train; a step's own may join them in the file."""
        self._write(kind, step, None)

    def confirm(self, pending: Any) -> None:
        """Takes the outcome of a write, if it is one's.

        Raises:
            StorageError: a file could not be written, by several writers.
        """
        if pending is not self._attempt or self._attempt is None:
            return
        attempt, self._attempt, write = self._attempt, None, self._waiting[0]
        if attempt.error is not None:
            self._replace_writer(write, attempt.error)
        else:
            report = attempt.value
            self._waiting.popleft()
            self._num_bytes = report.num_bytes
            if report.lost:
                self._on_event("completions_lost", step=write.order.facts.step, groups=report.lost)
            if write.order.kind == "step" and write.order.minibatches:
                self._on_sample(write.order.facts.step, report.sample)
        self._send()

    def metrics(self) -> dict[str, float]:
        """Completions that were given to the store, and those left out, since the last call."""
        if not self._is_on:
            return {}
        counts = {"num_rows": self._num_rows, "num_unstored": self._num_unstored}
        self._num_rows = self._num_unstored = 0
        return {f"completions_store/{name}": float(count) for name, count in counts.items()}

    def close(self) -> None:
        """Ends the writer."""
        if self._actor is not None:
            ray.kill(self._actor)

    def _write(self, kind: Kind, step: int, batch: StepBatch | None) -> None:
        stream: Stream = "train" if kind == "step" else "eval"
        trained = batch.payloads if batch else {}
        held = self._held[stream]
        chosen = [
            group_id
            for group_id, (stored, _) in held.items()
            if stored.fate != "kept" or group_id in trained
        ]
        taken = [held.pop(group_id) for group_id in chosen]
        num_rows = sum(len(stored.summary.lengths) for stored, _ in taken)
        self._note_full(step)
        if self._is_full or not taken:
            self._num_unstored += num_rows
            return
        self._num_rows += num_rows
        minibatches = batch.minibatches if batch else ()
        facts = FileFacts(
            step=step,
            complete=self._frac >= 1,
            num_minibatches=len(minibatches),
            has_signal=batch is not None and batch.has_signal,
        )
        groups = tuple(stored for stored, _ in taken)
        order = WriteOrder(kind=kind, facts=facts, groups=groups, minibatches=minibatches)
        self._waiting.append(_Write(order, [payload for _, payload in taken]))
        self._send()

    def _note_full(self, step: int) -> None:
        if self._is_on and not self._is_full and self._num_bytes >= self._max_bytes:
            self._is_full = True
            self._on_event("completions_full", step=step, num_bytes=self._num_bytes)

    def _send(self) -> None:
        if self._attempt is not None or not self._waiting:
            return
        if self._actor is None:
            self._actor = self._new_writer()
        write = self._waiting[0]
        write.attempts += 1
        ref = self._actor.write.remote(write.order, write.payloads)
        name = f"rollout-writer ({write.order.kind} {write.order.facts.step})"
        self._attempt = _Attempt(name, [ref], self._timeout_s, lambda reports: reports[0])

    def _new_writer(self) -> Any:
        # The run directory is sure to be the driver's own only on the driver's node.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        log = log_path(self._logs, "rollout-writer")
        arguments = (str(self._directory), self._timeout_s, log)
        return spawn(RolloutWriterActor, *arguments, num_cpus=0, scheduling_strategy=here)

    def _replace_writer(self, write: _Write, error: InfraError) -> None:
        if write.attempts >= _MAX_ATTEMPTS:
            raise StorageError(
                f"{write.attempts} writers in a row failed at the completions of step "
                f"{write.order.facts.step}, the last one: {error}",
                "see logs/ for the reason (out of memory is the usual one)",
            ) from error
        ray.kill(self._actor)
        self._actor = None
        fields = {"worker": "rollout-writer", "groups": [], "error": str(error)}
        self._on_event("worker_replaced", step=write.order.facts.step, **fields)


def put_groups(groups: Mapping[int, Group]) -> dict[int, Any]:
    """References to groups, as a step's payloads are."""
    return {group_id: ray.put(group) for group_id, group in groups.items()}
