"""The end of a step: its evaluation, its row of metrics, and its checkpoint, in that order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from raygrpo.actors.futures import Pending
from raygrpo.actors.learner import LearnerGroup
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.rollout_writer import RolloutLog
from raygrpo.config import RunConfig
from raygrpo.data.prompts import PromptStream
from raygrpo.storage.checkpoint import Checkpoints
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.tracker import Tracker
from raygrpo.training.evaluation import Evaluations
from raygrpo.training.state import RunState
from raygrpo.types import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a trainer drives."""

    config: RunConfig
    pool: RolloutPool
    learner: LearnerGroup
    prompts: PromptStream
    evaluations: Evaluations
    tracker: Tracker
    rollouts: RolloutLog
    run_dir: RunDir
    checkpoints: Checkpoints
    incarnation: int


class Boundary:
    """Closes the step that ended last, while generation goes on.

    Attributes:
        save: the learner's half of a checkpoint under way.
        stopping: whether an orderly stop was asked for; the open step is still committed.
    """

    def __init__(self, parts: Parts, state: RunState, restored: RunState | None) -> None:
        """``state`` is the one to begin with, ``restored`` the same as a checkpoint had it."""
        self._config, self._incarnation = parts.config, parts.incarnation
        self._pool, self._learner, self._rollouts = parts.pool, parts.learner, parts.rollouts
        self._evaluations, self._tracker = parts.evaluations, parts.tracker
        self._run_dir, self._checkpoints = parts.run_dir, parts.checkpoints
        # As the step ended, whatever finishes until its checkpoint is begun.
        self._state = state
        # A checkpoint whose evaluation is still due is written again once that is done.
        self._saved_step = restored.step if restored and restored.record is None else -1
        self._record = restored.record if restored else {}
        self._deferred: dict[str, float] | None = None
        self._saving: tuple[Path, RunState] | None = None
        self.save: Pending[None] | None = None
        self.stopping = False

    @property
    def step(self) -> int:
        """Steps that have ended."""
        return self._state.step

    @property
    def complete(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self._config.train.steps or self._evaluations.end_the_run

    @property
    def is_last(self) -> bool:
        """Whether no step comes after this one, in this process."""
        return self.stopping or self.complete

    @property
    def closed(self) -> bool:
        """Whether the next update may start: an evaluation is of one version, so the update waits
        for it; so it does for the record, and for the begin of the checkpoint."""
        return self._record is None and not self._save_is_due()

    @property
    def ended(self) -> bool:
        """Whether the last step is recorded and committed."""
        busy = self.save is not None or self._record is not None
        return self.is_last and not busy and self._saved_step == self.step

    @property
    def has_deferred(self) -> bool:
        """Whether a stop left the evaluation to the run that resumes."""
        return self._deferred is not None

    def end_step(self, state: RunState, record: dict[str, float]) -> None:
        """A step was trained: ``record`` are its metrics, without those of an evaluation."""
        self._state, self._record = state, record

    def settle(self, *, published: bool) -> None:
        """Closes what can be closed: the evaluation, then the record, then the checkpoint."""
        if self._record is not None and published:
            self._settle_record(self._record)
        if self.save is not None and not self.save.open_refs:
            assert self._saving is not None
            directory, state = self._saving
            closed = self._record is None or state.step < self.step
            if closed and self._rollouts.settled(state.step):
                self._commit(directory, state)
                self.save = self._saving = None

    def start_save(self, *, updating: bool) -> None:
        """Begins the step's checkpoint where one is due; an update under way must end first."""
        if self.save or updating or not self._save_is_due():
            return
        directory = self._checkpoints.begin(self.step)
        self._saving = (directory, self._saved_state())
        self.save = self._learner.save(directory)

    def _save_is_due(self) -> bool:
        """Whether this step's checkpoint is still to be begun."""
        begun = self._saving is not None and self._saving[1].step == self.step
        if begun or self._saved_step == self.step:
            return False
        every = self._config.checkpoint.save_steps
        regular = every and self.step and self.step % every == 0
        best = self._evaluations.best.step == self.step
        return bool(regular or best or self.is_last)

    def _saved_state(self) -> RunState:
        # Dropped groups may be counted as done: they must be on disk before the commit.
        self._rollouts.write_rest("step", self.step + 1)
        return replace(self._state, record=self._deferred, best=self._evaluations.best)

    def _commit(self, directory: Path, state: RunState) -> None:
        path = self._checkpoints.commit(directory, state.step, state)
        # Only now: what run.json names is on disk, before and after the older best one goes.
        if state.best.metric:
            self._run_dir.note(best=state.best.fact())
        self._checkpoints.prune(path, state.best.step)
        self._saved_step = state.step
        self._tracker.event("checkpoint", step=state.step, path=path.name)

    def _settle_record(self, record: dict[str, float]) -> None:
        evaluations = self._evaluations
        if evaluations.due(self.step):
            if self.stopping and not evaluations.done:
                # The checkpoint keeps the record, and the resumed run evaluates and logs it.
                self._deferred = record
                evaluations.cancel()
                self._pool.forget("eval")
                self._close_record()
                return
            if not evaluations.under_way:
                for request in evaluations.begin(Version(self._incarnation, self.step)):
                    self._pool.submit(request)
            if not evaluations.done:
                return
            self._rollouts.write_rest("eval", self.step)
            metrics, events = evaluations.end(self.step)
            record = record | metrics
            for kind, fields in events:
                self._tracker.event(kind, step=self.step, **fields)
        if record:
            self._tracker.log_step(self.step, record)
        self._close_record()

    def _close_record(self) -> None:
        self._record = None
        if self._saving is not None and self._saving[1].step == self.step:
            # The save began before: the state beside it is still that of this step's boundary.
            self._saving = (self._saving[0], self._saved_state())
