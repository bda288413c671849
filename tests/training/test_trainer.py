"""The trainer over parts without processes, which note what it has them do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from raygrpo.actors.futures import Pending
from raygrpo.actors.pool.workers import PoolEvents
from raygrpo.config import RunConfig
from raygrpo.rewards.contract import TrainerState
from raygrpo.storage.checkpoint import Checkpoints
from raygrpo.storage.rollouts import Kind
from raygrpo.storage.run_dir import RunDir
from raygrpo.training.state import BestSoFar, load_state
from raygrpo.training.trainer import Trainer
from raygrpo.training.wiring import Wiring
from raygrpo.types import FinishedGroup, GroupRequest, StepBatch, StepResult, Stream, Version
from raygrpo.weights.types import PublishReport
from tests import builders
from tests.data.data_cases import ROWS, source_of

STEPS = 3


class Call(Pending[Any]):
    """A call of the learner or the store: done where ``refs`` is empty."""

    def __init__(self, name: str, value: Any = None, refs: Sequence[str] = ()) -> None:
        super().__init__(name, refs, 60.0, lambda _: value)


Wait = Callable[[Sequence[Pending[Any]]], PoolEvents]


@dataclass
class Parts:
    """Pool, learner, store and tracker of a run in one; ``script`` is what each wait brings.

    Without a script a wait brings all that was asked for.
    """

    script: list[Wait] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    asleep: bool = True
    normal_gap: float | None = None
    has_room: bool = True
    sent: list[GroupRequest] = field(default_factory=list)
    open_saves: list[str] = field(default_factory=list)
    pendings: list[Pending[Any]] = field(default_factory=list)

    # The pool.

    def submit(self, request: GroupRequest) -> None:
        self.sent.append(request)

    def forget(self, stream: Stream) -> None:
        self.calls.append(f"forget {stream}")
        self.sent = [request for request in self.sent if request.stream != stream]

    def load(self, broken: Mapping[str, str] = {}) -> None:
        assert not broken
        self.calls.append("load")

    def sleep(self) -> bool:
        self.calls.append("sleep")
        return self.asleep

    def receivers(self) -> dict[str, Any]:
        return {}

    def take_idle_frac(self) -> float | None:
        return None

    def wait(
        self, pendings: Sequence[Pending[Any]], timeout_s: float, trainer_state: TrainerState
    ) -> PoolEvents:
        return self.script.pop(0)(pendings) if self.script else self.come(pendings)

    def come(self, pendings: Sequence[Pending[Any]]) -> PoolEvents:
        """All that was asked for: groups, and calls that are not held open."""
        sent, self.sent = self.sent, []
        done = [pending for pending in pendings if not pending.open_refs]
        return PoolEvents(groups=list(map(finished, sent)), completed=done)

    # The learner.

    def update(self, batch: StepBatch, incarnation: int) -> Pending[StepResult]:
        self.calls.append(f"update {batch.step}")
        version = Version(incarnation, batch.step + 1)
        return Call("update", StepResult(version=version, stats={}, seconds=0.1))

    def publish(self, version: Version, generators: Mapping[str, Any]) -> Pending[PublishReport]:
        self.calls.append(f"publish {version.step}")
        report = PublishReport(
            version=version, kind="full", num_bytes=1, full_bytes=1, changed_frac=None
        )
        return Call("publish", report)

    def save(self, directory: Path) -> Pending[None]:
        self.calls.append(f"save {directory.name[-1]}")
        return Call("save", refs=self.open_saves)

    # The rollout store.

    def settled(self, step: int) -> bool:
        return True

    def take(self, decided: Iterable[FinishedGroup]) -> None:
        assert all(group.fate for group in decided)

    def write_step(self, batch: StepBatch) -> None:
        self.calls.append(f"write {batch.step + 1}")

    def write_rest(self, kind: Kind, step: int) -> None:
        self.calls.append(f"write rest of {kind} {step}")

    def confirm(self, pending: Pending[Any]) -> None:
        assert pending.name == "save"

    def metrics(self) -> dict[str, float]:
        return {}

    # The tracker.

    def event(self, kind: str, /, **fields: Any) -> None:
        self.calls.append(kind)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"log {step}")
        self.rows[step] = dict(metrics)


def finished(request: GroupRequest) -> FinishedGroup:
    """A group of a request whose rewards differ where it has several completions."""
    count = request.sampling.num_completions
    group = builders.finished(request.group_id, [float(i % 2) for i in range(count)])
    summary = replace(group.summary, stream=request.stream, prompt_id=request.prompt.id)
    return replace(group, summary=replace(summary, answers=("",) * count))


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    claimed = RunDir.claim(config(run_dir=str(tmp_path / "run")))
    yield claimed
    claimed.release()


def config(**sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "sampling": {"num_completions": 2, "max_tokens": 8},
        "train": {"steps": STEPS, "groups_per_step": 1},
        "checkpoint": {"save_steps": 0},
        "eval": {"eval_steps": 0, "num_completions": 2},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    return builders.config(**base)


def trainer(parts: Parts, run_dir: RunDir, restored: Any = None, **sections: Any) -> Trainer:
    settings = config(**sections)
    wiring = Wiring(
        config=settings,
        pool=parts,
        learner=parts,
        prompts=source_of(ROWS),
        eval_prompts=[builders.prompt()] if settings.eval.eval_steps else [],
        tracker=parts,
        rollouts=parts,
        run_dir=run_dir,
        checkpoints=Checkpoints(run_dir.checkpoints),
        incarnation=1,
    )
    return Trainer(wiring, restored)


def test_a_run_from_start_to_end(run_dir: RunDir) -> None:
    parts = Parts()
    made = trainer(parts, run_dir)
    assert made.run()
    assert made.step == STEPS
    steps = range(1, STEPS + 1)
    trained = [call for step in steps for call in (f"update {step - 1}", f"publish {step}")]
    calls = [call for call in parts.calls if call.startswith(("publish", "update"))]
    assert calls == ["publish 0", *trained]
    assert list(parts.rows) == list(steps)
    assert parts.calls[-1] == "checkpoint" and parts.calls.count("checkpoint") == 1
    assert all(row["ledger/unexplained"] == 0 for row in parts.rows.values())
    assert parts.rows[STEPS]["ledger/trained"] == STEPS * 2 * 4


def everything(pendings: Sequence[Pending[Any]]) -> PoolEvents:
    """All calls have ended; no group has come."""
    return PoolEvents(completed=list(pendings))


@pytest.mark.parametrize(
    ("script", "publishes"),
    [
        ([everything, lambda _: PoolEvents(weights_lost=True)], 2),
        ([lambda p: replace(everything(p), weights_lost=True)], 1),
        ([lambda _: PoolEvents(weights_lost=True), everything], 1),
    ],
    ids=["idle", "with the publish that ended", "a publish under way"],
)
def test_lost_weights_are_published_again_unless_they_just_were(
    run_dir: RunDir, script: list[Wait], publishes: int
) -> None:
    """A store refuses a version that it has: the loss may be older than the publish."""
    parts = Parts(script=script)
    trainer(parts, run_dir).run()
    # No update starts between: a load of the same version would wake generators beside it.
    before = parts.calls[: parts.calls.index("update 0")]
    assert before.count("publish 0") == before.count("load") == publishes


def test_lost_weights_wait_for_a_save_under_way_and_are_not_forgotten(run_dir: RunDir) -> None:
    """The learner's calls queue: behind a long save a publish would miss its own deadline."""
    parts = Parts(open_saves=["rank 0"])

    def lose_weights(pendings: Sequence[Pending[Any]]) -> PoolEvents:
        assert [pending.name for pending in pendings] == ["save"]
        return PoolEvents(weights_lost=True)

    def end_the_save(pendings: Sequence[Pending[Any]]) -> PoolEvents:
        assert parts.calls.count("publish 0") == 1
        pendings[0].refs.clear()
        return PoolEvents()

    made = trainer(parts, run_dir)
    made.stop()  # the first step's boundary is saved at once
    parts.script = [parts.come, lose_weights, end_the_save]
    assert not made.run()
    assert parts.calls.count("publish 0") == 2


@pytest.mark.parametrize("placement", ["disaggregate", "colocate"])
def test_an_update_waits_until_colocated_generators_sleep(run_dir: RunDir, placement: str) -> None:
    parts = Parts(asleep=False)
    made = trainer(parts, run_dir, generators={"placement": placement})

    def fall_asleep(pendings: Sequence[Pending[Any]]) -> PoolEvents:
        assert ("update 0" in parts.calls) == (placement == "disaggregate")
        parts.asleep = True
        return parts.come(pendings)

    parts.script = [parts.come, fall_asleep]
    assert made.run()
    assert ("sleep" in parts.calls) == (placement == "colocate")


def test_a_save_may_end_after_the_next_step(run_dir: RunDir) -> None:
    """A step is saved while the next ones are trained; the one after waits for its own save."""
    parts = Parts(open_saves=["rank 0"])
    made = trainer(parts, run_dir, checkpoint={"save_steps": 1})
    steps: list[int] = []

    def go_on(pendings: Sequence[Pending[Any]]) -> PoolEvents:
        steps.append(made.step)
        if len(steps) > 20:
            for pending in pendings:
                pending.refs.clear()
        return parts.come(pendings)

    parts.script = [go_on] * 60
    made.run()
    assert max(steps[:20]) == 2, "step 1 is being saved, step 2 is trained, its save waits"
    assert len(Checkpoints(run_dir.checkpoints).all()) == STEPS


def test_a_stop_leaves_the_evaluation_to_the_run_that_resumes(run_dir: RunDir) -> None:
    parts, evaluates = Parts(), {"eval_steps": 2, "best": {"metric": "eval/reward"}}
    made = trainer(parts, run_dir, eval=evaluates)

    def stop_at_step_2(pendings: Sequence[Pending[Any]]) -> PoolEvents:
        if made.step == 2:
            made.stop()
            parts.sent.clear()
        return parts.come(pendings)

    parts.script = [stop_at_step_2] * 30
    assert not made.run()
    assert list(parts.rows) == [0, 1]
    assert "forget eval" in parts.calls
    state = load_state(Checkpoints(run_dir.checkpoints).path(2))
    assert state.record is not None and state.best.step == 0
    resumed = Parts()
    assert trainer(resumed, run_dir, state, eval=evaluates).run()
    assert list(resumed.rows) == [2, 3]
    assert resumed.rows[2].items() > state.record.items()
    assert "eval/reward" in resumed.rows[2]


def test_a_run_ends_early_with_its_best_step_saved(run_dir: RunDir) -> None:
    best = {"metric": "eval/reward", "patience": 1}
    parts = Parts()
    assert trainer(parts, run_dir, eval={"eval_steps": 1, "best": best}).run()
    assert list(parts.rows) == [0, 1], "all evaluations are alike, so the first is the best"
    assert parts.calls.count("early_stop") == 1
    checkpoints = Checkpoints(run_dir.checkpoints)
    assert [path.name[-1] for path in checkpoints.all()] == ["0", "1"]
    state = load_state(checkpoints.path(1))
    assert state.best == BestSoFar(
        metric="eval/reward", step=0, value=0.5, num_since=1, ended_at=STEPS
    )
