"""The loop: admit groups, train steps, publish weights, and nothing else.

One loop serves on-policy and asynchronous training: on-policy is a ``max_staleness`` of 0. The
driver holds references and summaries, never tokens. `Pool.wait` is the only line that blocks.

    stage             waits for                              unblocked by
    prompts
      |
    _admit            room in the window                     a step taken, a group dropped
      |
    pool: generate    a generator with the request's         a load of newer weights
      |               min_version
    pool: score       a scorer                               another group's scores
      |
    window            the groups before it, then the rest    their scores, or the drop of one that
      |               of its step                            cannot be served
    learner.update    the last publish, the last step's      `Boundary.advance`
      |               record, the begin of its checkpoint
    end_step          nothing: the step is evaluated, recorded and saved while groups are generated
    learner.publish   the update                             its result
      |
    pool.load         nothing: generators pull the version beside their decoding
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raygrpo.actors.futures import Pending
from raygrpo.actors.idle import IdleClock, IdleShare
from raygrpo.actors.pool.workers import PoolEvents
from raygrpo.algorithm.ledger import TokenLedger, buffered_tokens
from raygrpo.algorithm.step_plan import make_step_batch, num_trained_tokens
from raygrpo.algorithm.window import Window, train_request
from raygrpo.config import RunConfig
from raygrpo.errors import DataError
from raygrpo.rewards.budget import ScoreBudget
from raygrpo.rewards.contract import TrainerState
from raygrpo.tracking.metrics import StepFacts, step_metrics
from raygrpo.tracking.sync_metrics import publish_metrics, with_load
from raygrpo.training.boundary import Boundary
from raygrpo.training.state import RunState
from raygrpo.training.wiring import Wiring
from raygrpo.types import FinishedGroup, GroupSummary, StepBatch, StepResult, Stream, Version
from raygrpo.weights.types import PublishReport

_TICK_S = 1.0  # how soon a signal is noticed while nothing else happens


@dataclass(slots=True)
class Interval:
    """What has happened since the last step ended; one row of metrics tells of it."""

    budget: ScoreBudget
    started: float = field(default_factory=time.monotonic)
    finished: list[GroupSummary] = field(default_factory=list)
    num_teaching: int = 0
    num_dropped: int = 0

    @classmethod
    def begin(cls, config: RunConfig) -> Interval:
        """One that begins now."""
        num_planned = config.train.groups_per_step * config.sampling.num_completions
        max_error_frac = config.scorers.max_reward_error_frac
        return cls(ScoreBudget(max_error_frac=max_error_frac, num_planned=num_planned))


class Trainer:
    """Runs a training run, from where an earlier start of it left off.

    Attributes:
        step: StepBatches trained.
        first_group_at: when the first group's completions were there, as `time.time` has it.
    """

    def __init__(self, wiring: Wiring, restored: RunState | None = None) -> None:
        """``restored`` is the driver's state of the checkpoint that the run goes on from."""
        self._config = config = wiring.config
        self._pool, self._learner, self._prompts = wiring.pool, wiring.learner, wiring.prompts
        self._tracker, self._rollouts = wiring.tracker, wiring.rollouts
        self._incarnation = wiring.incarnation
        self.step = restored.step if restored else 0
        self._window = Window(
            steps=config.train.steps,
            groups_per_step=config.train.groups_per_step,
            max_staleness=config.train.max_staleness,
            max_refills=config.train.max_refills,
            state=restored.window if restored else None,
        )
        ledger = restored.ledger.roll_back(restored.buffered_tokens) if restored else None
        self._ledger = ledger or TokenLedger()
        self._num_tokens = restored.num_tokens if restored else 0
        self._update: Pending[StepResult] | None = None
        self._publish: Pending[PublishReport] | None = None
        self._weights_lost = self._stopping = False
        self._training: tuple[StepBatch, list[FinishedGroup]] | None = None
        self._sync: dict[str, float] = {}
        self._learner_idle, self._learner_share = IdleClock(), IdleShare()
        self._interval = Interval.begin(config)
        self._driver_s = 0.0
        self._num_groups = 0
        self._boundary = Boundary(wiring, self._state(), restored)
        self._first_traceback: str | None = None
        self.first_group_at: float | None = None

    def stop(self) -> None:
        """Asks for an orderly stop: the running update is finished and committed."""
        self._stopping = True

    @property
    def driver_s_per_group(self) -> float:
        """The driver's own time for each finished group, without its waits."""
        return self._driver_s / max(self._num_groups, 1)

    def run(self) -> bool:
        """Trains to the last step; False when it was stopped before, with all committed."""
        self._interval = Interval.begin(self._config)
        self._learner_share.update(self._learner_idle.read())
        self._start_publish()
        if self.step < self._config.train.steps:
            for request in self._window.pending:
                self._pool.submit(request)
        while not self._is_over:
            started = time.monotonic()
            self._boundary.advance(
                published=self._publish is None,
                updating=self._update is not None,
                stopping=self._stopping,
            )
            self._admit()
            self._start_update()
            self._learner_idle.mark(busy=self._learner_is_busy)
            happened = self._pool.wait(self._pendings(), _TICK_S, self._trainer_state)
            self._take(happened)
            self._driver_s += time.monotonic() - started - happened.waited_s
        return self._boundary.is_finished

    @property
    def _is_last(self) -> bool:
        """Whether no step comes after this one, in this process."""
        return self._stopping or self._boundary.is_last

    @property
    def _is_over(self) -> bool:
        return self._is_last and self._boundary.is_saved and not (self._update or self._publish)

    @property
    def _learner_is_busy(self) -> bool:
        # A save that is written may still wait for its step's record.
        save = self._boundary.save
        return bool(self._update or self._publish or (save and save.open_refs))

    @property
    def _trainer_state(self) -> TrainerState:
        """What rewards are told of the run."""
        return TrainerState(
            global_step=self.step, max_steps=self._config.train.steps, epoch=self._prompts.epoch
        )

    def _pendings(self) -> list[Pending[Any]]:
        ours = [self._update, self._publish, self._boundary.save]
        return [pending for pending in ours if pending is not None] + self._rollouts.pendings

    def _state(self) -> RunState:
        return RunState(
            step=self.step,
            window=self._window.state(),
            prompts=self._prompts.state(),
            ledger=self._ledger,
            num_tokens=self._num_tokens,
            buffered_tokens=buffered_tokens(self._window.buffered),
            normal_gap=self._pool.normal_gap,
        )

    # What may start.

    def _admit(self) -> None:
        while not self._is_last and self._window.has_room(self.step):
            version = Version(self._incarnation, self.step)
            prompt = self._prompts.next()
            request = train_request(self._config, self._window.admitted, prompt, version)
            self._pool.submit(self._window.admit(request))

    def _start_update(self) -> None:
        # A version that is published again wakes generators, which may share the learner's GPUs.
        busy = self._update or self._publish or self._weights_lost
        if busy or self._is_last or not self._boundary.may_update:
            return
        if not (self._window.step_ready() and self._rollouts.has_room):
            return
        if self._config.generators.placement == "colocate" and not self._pool.sleep():
            return
        groups = self._window.take_step()
        self._prompts.settle(groups[-1].summary.group_id)
        batch = make_step_batch(self.step, groups, self._config)
        for group in groups:
            self._ledger = self._ledger.take(group.summary, self._trained(group.summary))
        self._rollouts.write_step(batch)
        self._training = (batch, groups)
        self._update = self._learner.update(batch, self._incarnation)

    def _start_publish(self) -> None:
        version = Version(self._incarnation, self.step)
        self._weights_lost = False
        self._publish = self._learner.publish(version, self._pool.receivers())

    # What has happened.

    def _take(self, happened: PoolEvents) -> None:
        for kind, fields in happened.events:
            self._tracker.event(kind, step=self.step, **fields)
        for load in happened.loads:
            self._sync = with_load(self._sync, load)
        self._ledger = self._ledger.abort(happened.aborted_tokens)
        for group in happened.groups:
            self._take_group(group)
        self._ledger = self._ledger.lose(sum(stream == "train" for stream, _ in happened.lost))
        for stream, group_id in happened.dropped:
            self._drop(stream, group_id)
        # A publish that ended in the same wait is newer than the loss.
        published = self._publish in happened.completed
        for pending in happened.completed:
            if pending is self._update:
                self._take_update()
            elif pending is self._publish:
                self._take_publish()
            else:
                self._rollouts.confirm(pending)
        self._weights_lost |= happened.weights_lost and not published
        # While the learner is busy, it has no weights of this version to give.
        if self._weights_lost and not self._learner_is_busy:
            self._start_publish()

    def _take_group(self, group: FinishedGroup) -> None:
        summary = group.summary
        self._num_groups += 1
        if self.first_group_at is None:
            self.first_group_at = time.time() - summary.score_s
        if group.traceback and self._first_traceback is None:
            self._first_traceback = group.traceback
            self._tracker.event("reward_error", step=self.step, traceback=group.traceback)
        if summary.stream == "eval":
            self._boundary.finish(summary)
            self._rollouts.take([replace(group, fate="eval")])
            return
        self._interval.budget.take(summary.scores, self._first_traceback)
        awaited = self._window.awaits(summary.group_id)
        self._ledger = self._ledger.report(summary, awaited=awaited)
        self._num_tokens += summary.prompt_length * len(summary.lengths) + sum(summary.lengths)
        self._interval.finished.append(summary)
        self._interval.num_teaching += group.teaches
        self._take_decided(self._window.finish(group))

    def _take_decided(self, decided: Sequence[FinishedGroup]) -> None:
        self._ledger = self._ledger.decide(decided)
        self._rollouts.take(decided)
        self._prompts.observe([group.summary for group in decided])

    def _drop(self, stream: Stream, group_id: int) -> None:
        if stream == "eval":
            self._boundary.drop()
            return
        self._ledger = self._ledger.drop(1)
        self._take_decided(self._window.fail(group_id))
        self._interval.num_dropped += 1
        if self._interval.num_dropped > self._config.train.groups_per_step:
            raise DataError(
                f"{self._interval.num_dropped} groups of one step could not be generated",
                "events.jsonl names each and the reason",
            )

    def _take_publish(self) -> None:
        assert self._publish is not None
        report = self._publish.value
        self._sync = publish_metrics(report, self._publish.seconds)
        self._publish, self._weights_lost = None, False
        self._pool.load(report.broken)

    def _take_update(self) -> None:
        assert self._update is not None
        assert self._training is not None
        result, (batch, groups) = self._update.value, self._training
        self._update, self._training = None, None
        interval, self._interval = self._interval, Interval.begin(self._config)
        facts = StepFacts(
            step=batch.step,
            finished=tuple(interval.finished),
            trained=tuple(group.summary for group in groups),
            num_teaching=interval.num_teaching,
            stats=result.stats,
            epoch=self._prompts.epoch,
            num_tokens=self._num_tokens,
            step_s=time.monotonic() - interval.started,
            update_s=result.seconds,
        )
        self.step += 1
        buffered = buffered_tokens(self._window.buffered)
        ours = self._ledger.metrics(buffered) | self._sync | self._rollouts.metrics()
        record = step_metrics(facts) | ours | self._prompt_metrics() | self._idle_metrics()
        self._boundary.end_step(self._state(), record)
        self._start_publish()

    def _idle_metrics(self) -> dict[str, float]:
        self._learner_share.update(self._learner_idle.read())
        shares = {
            "timing/generator_idle_frac": self._pool.take_idle_frac(),
            "timing/learner_wait_frac": self._learner_share.take(),
        }
        return {name: share for name, share in shares.items() if share is not None}

    def _prompt_metrics(self) -> dict[str, float]:
        metrics = self._prompts.metrics()
        if back := metrics.get("data/num_restored"):
            self._tracker.event("prompts_restored", step=self.step, num_prompts=int(back))
        return metrics

    def _trained(self, summary: GroupSummary) -> list[int]:
        section = self._config.advantage
        return [num_trained_tokens(summary, i, section) for i in range(len(summary.lengths))]
