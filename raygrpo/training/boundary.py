"""The end of a step: its evaluation, its row of metrics, and its checkpoint.

The trainer calls `Boundary.advance` in each turn of its loop; nothing here blocks. A step that has
ended goes through these phases:

    phase        waits for                                     unblocked by
    EVALUATING   the publish of the step's weights, then the   `advance(published=True)`, then
                 groups of its evaluation                      `Boundary.finish`, `Boundary.drop`
    RECORDING    nothing: the row of metrics is logged
    SAVING       the learner's files, then the rollout         the learner's `Pending`, then
                 store's files                                 `Rollouts.settled`
    CLOSED       nothing

The learner may begin to write its files while the step is EVALUATING; a checkpoint is committed in
SAVING. The next update may start once the learner has begun to write. So the step before the newest
may still be SAVING.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from raygrpo.actors.futures import Pending
from raygrpo.training.evaluation import Evaluation, is_due
from raygrpo.training.state import BestSoFar, RunState
from raygrpo.training.wiring import Wiring
from raygrpo.types import GroupSummary, Version


class Phase(Enum):
    """How far the end of a step has come; the module's docstring says what each waits for."""

    EVALUATING = "evaluating"
    RECORDING = "recording"
    SAVING = "saving"
    CLOSED = "closed"


@dataclass(slots=True)
class ClosingStep:
    """A step that has ended. Example: ClosingStep(state, record={"loss": 0.01}).

    ``state`` is the driver's state at the step's end, which the checkpoint holds. ``record`` are
    the step's metrics. ``directory`` is the checkpoint's, set when the learner begins to write it;
    ``save`` is that write until the commit.
    """

    state: RunState
    record: dict[str, float]
    phase: Phase = Phase.EVALUATING
    evaluation: Evaluation | None = None
    directory: Path | None = None
    save: Pending[None] | None = None

    @property
    def number(self) -> int:
        """Steps trained, this one included."""
        return self.state.step


class Boundary:
    """Closes steps, while generation goes on.

    Attributes:
        best: the best evaluation so far.
    """

    def __init__(self, wiring: Wiring, state: RunState, restored: RunState | None) -> None:
        """``state`` is the driver's at the start; ``restored`` is what its checkpoint held."""
        self._config, self._incarnation = wiring.config, wiring.incarnation
        self._pool, self._learner, self._rollouts = wiring.pool, wiring.learner, wiring.rollouts
        self._tracker, self._run_dir = wiring.tracker, wiring.run_dir
        self._checkpoints, self._eval_prompts = wiring.checkpoints, wiring.eval_prompts
        no_best = BestSoFar(metric=self._config.eval.best.metric or "")
        self.best = restored.best if restored else no_best
        if restored and restored.record is None:
            directory = self._checkpoints.path(restored.step)
            self._newest = ClosingStep(state, {}, Phase.CLOSED, directory=directory)
        else:  # the first start, or a stop left the evaluation to this one
            self._newest = ClosingStep(state, dict((restored and restored.record) or {}))
        self._older: ClosingStep | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to train after the newest step."""
        return self._newest.number >= self._config.train.steps or self.best.has_ended(self._config)

    @property
    def is_finished(self) -> bool:
        """Whether the run is: nothing is left to train, or to evaluate."""
        return self.is_last and self._newest.state.record is None

    @property
    def may_update(self) -> bool:
        """Whether the next update may start: an evaluation is of one version, and a checkpoint's
        files are those of one step."""
        begun = self._newest.phase is Phase.SAVING and self._newest.save is not None
        return begun or self._newest.phase is Phase.CLOSED

    @property
    def is_saved(self) -> bool:
        """Whether the newest step is committed, and nothing is under way."""
        newest = self._newest
        return newest.phase is Phase.CLOSED and newest.directory is not None and not self.save

    @property
    def save(self) -> Pending[None] | None:
        """The learner's part of a checkpoint that is not committed yet."""
        return (self._older.save if self._older else None) or self._newest.save

    def end_step(self, state: RunState, record: dict[str, float]) -> None:
        """A step was trained: ``record`` are its metrics, without those of an evaluation."""
        if self._newest.save:
            self._older = self._newest
        self._newest = ClosingStep(state, record)

    def finish(self, summary: GroupSummary) -> None:
        """Takes a group of the evaluation."""
        if self._newest.evaluation:
            self._newest.evaluation.finish(summary)

    def drop(self) -> None:
        """A group of the evaluation cannot be served."""
        if self._newest.evaluation:
            self._newest.evaluation.drop()

    def advance(self, *, published: bool, updating: bool, stopping: bool) -> None:
        """Takes each step as far as it can go now.

        Args:
            published: whether the newest step's weights can be loaded.
            updating: whether an update is under way, which a save must not fall into.
            stopping: whether the run is to stop after the newest step.
        """
        newest = self._newest
        if self._older:
            self._commit_when_written(self._older)
        if newest.phase is Phase.EVALUATING and published:
            self._evaluate(newest, stopping=stopping)
        if newest.phase is Phase.RECORDING:
            self._record(newest)
        due = self._save_is_due(newest, stopping=stopping)
        if due and not updating and not self.save:
            self._begin_save(newest)
        if newest.phase is Phase.SAVING and newest.directory is None and not due:
            newest.phase = Phase.CLOSED
        elif newest.phase is Phase.CLOSED and due:  # the stop was asked for after the step's end
            newest.phase = Phase.SAVING
        self._commit_when_written(newest)

    def _evaluate(self, step: ClosingStep, *, stopping: bool) -> None:
        if not (self._eval_prompts and is_due(step.number, self._config)):
            step.phase = Phase.RECORDING
            return
        evaluation = step.evaluation
        if stopping and not (evaluation and evaluation.done):
            # The checkpoint keeps the record; the resumed run evaluates and logs it.
            self._pool.forget("eval")
            step.evaluation = None
            step.state = replace(step.state, record=step.record, best=self.best)
            step.phase = Phase.SAVING
        elif evaluation is None:
            version = Version(self._incarnation, step.number)
            step.evaluation = Evaluation(self._eval_prompts, version, self._config)
            for request in step.evaluation.requests:
                self._pool.submit(request)
        elif evaluation.done:
            self._rollouts.write_rest("eval", step.number)
            metrics = evaluation.metrics()
            step.record |= metrics
            self.best = self.best.take(step.number, metrics, self._config)
            if self.best.has_ended(self._config):
                self._tracker.event("early_stop", step=step.number, best_step=self.best.step)
            step.phase = Phase.RECORDING

    def _record(self, step: ClosingStep) -> None:
        if step.record:  # empty before the first step, where nothing was evaluated
            self._tracker.log_step(step.number, step.record)
        step.state = replace(step.state, best=self.best)
        step.phase = Phase.SAVING

    def _save_is_due(self, step: ClosingStep, *, stopping: bool) -> bool:
        """Whether the step's checkpoint is still to be begun."""
        if step.directory is not None:
            return False
        every = self._config.checkpoint.save_steps
        regular = every and step.number and step.number % every == 0
        return bool(regular or self.best.step == step.number or stopping or self.is_last)

    def _begin_save(self, step: ClosingStep) -> None:
        # The state counts dropped groups as done: they must be on disk before the commit.
        self._rollouts.write_rest("step", step.number + 1)
        step.directory = self._checkpoints.begin(step.number)
        step.save = self._learner.save(step.directory)

    def _commit_when_written(self, step: ClosingStep) -> None:
        if step.phase is not Phase.SAVING or step.save is None or step.directory is None:
            return
        if step.save.open_refs or not self._rollouts.settled(step.number):
            return
        path = self._checkpoints.commit(step.directory, step.number, step.state)
        # Only now: what run.json names is on disk, before and after the older best one goes.
        best = step.state.best
        if best.metric:
            self._run_dir.note(best=best.fact())
        self._checkpoints.prune(path, best.step)
        self._tracker.event("checkpoint", step=step.number, path=path.name)
        step.save, step.phase = None, Phase.CLOSED
