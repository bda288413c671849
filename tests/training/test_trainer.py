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
from raygrpo.config.file import load_config
from raygrpo.rewards.contract import TrainerState
from raygrpo.storage.checkpoint import Checkpoints
from raygrpo.storage.rollouts import Kind
from raygrpo.storage.run_dir import RunDir
from raygrpo.training.trainer import Trainer
from raygrpo.training.wiring import Wiring
from raygrpo.types import (
    FinishedGroup,
    GroupRequest,
    GroupSummary,
    Prompt,
    StepBatch,
    StepResult,
    Stream,
    Version,
)
from raygrpo.weights.types import PublishReport
from tests import builders

STEPS = 3


class Call(Pending[Any]):
    """A call of the learner or the store: done where ``refs`` is empty."""

    def __init__(self, name: str, value: Any = None, refs: Sequence[str] = ()) -> None:
        super().__init__(name, refs, 60.0, lambda _: value)


@dataclass
class Parts:
    """Pool, learner, store and tracker of a run in one; ``script`` is what each wait brings.

    Without a script a wait brings what was asked for, whole: groups, updates, publishes, saves.
    """

    script: list[Callable[[Parts], PoolEvents]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    asleep: bool = True
    normal_gap: float | None = None
    has_room: bool = True
    sent: list[GroupRequest] = field(default_factory=list)
    prompt_epoch: float = 0.0
    after_each_wait: Callable[[], None] = lambda: None

    # The pool.

    def submit(self, request: GroupRequest) -> None:
        self.sent.append(request)

    def forget(self, stream: Stream) -> None:
        self.calls.append(f"forget {stream}")
        self.sent = [request for request in self.sent if request.stream != stream]

    def load(self) -> None:
        self.calls.append("load")

    def sleep(self) -> bool:
        self.calls.append("sleep")
        return self.asleep

    def receivers(self) -> dict[str, Any]:
        return {}

    def replace_broken(self, reasons: Mapping[str, str]) -> None:
        assert not reasons

    def take_idle_frac(self) -> float | None:
        return None

    def wait(
        self, pendings: Sequence[Pending[Any]], timeout_s: float, trainer_state: TrainerState
    ) -> PoolEvents:
        events = self.script.pop(0)(self) if self.script else PoolEvents(groups=self.finish_all())
        done = tuple(p for p in pendings if not p.open_refs and p not in events.completed)
        self.after_each_wait()
        return replace(events, completed=(*events.completed, *done))

    def finish_all(self) -> tuple[FinishedGroup, ...]:
        sent, self.sent = self.sent, []
        return tuple(finished(request) for request in sent)

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

    open_saves: list[str] = field(default_factory=list)

    # The rollout store.

    pendings: list[Pending[Any]] = field(default_factory=list)

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


class Prompts:
    """The same prompt for ever."""

    num_dropped = num_truncated = 0
    epoch = 0.0

    def next(self) -> Prompt:
        return builders.prompt()

    def take(self, num_prompts: int) -> list[Prompt]:
        return [builders.prompt()] * num_prompts

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Learns nothing."""

    def settle(self, last_group_id: int) -> None:
        """Learns nothing."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Has no cursor."""


def finished(request: GroupRequest) -> FinishedGroup:
    """A group of a request whose rewards differ where it has several completions."""
    count = request.sampling.num_completions
    group = builders.finished(request.group_id, [float(i % 2) for i in range(count)])
    summary = replace(group.summary, stream=request.stream, answers=("",) * count)
    return replace(group, summary=summary)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    claimed = RunDir.claim(config(run_dir=str(tmp_path / "run")))
    yield claimed
    claimed.release()


def config(**sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"source": "d"},
        "sampling": {"num_completions": 2, "max_tokens": 8},
        "train": {"steps": STEPS, "groups_per_step": 1},
        "checkpoint": {"save_steps": 0},
        "eval": {"eval_steps": 0},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    return load_config(base)


def trainer(parts: Parts, run_dir: RunDir, restored: Any = None, **sections: Any) -> Trainer:
    settings = config(**sections)
    wiring = Wiring(
        config=settings,
        pool=parts,
        learner=parts,
        prompts=Prompts(),
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
    expected = ["publish 0", "load"]
    for step in range(1, STEPS + 1):
        expected += [
            f"write {step}",
            f"update {step - 1}",
            f"publish {step}",
            "load",
            f"log {step}",
        ]
    assert [call for call in parts.calls if "save" not in call] == [
        *expected, f"write rest of step {STEPS + 1}", "checkpoint",
    ]  # fmt: skip
    assert all(row["ledger/unexplained"] == 0 for row in parts.rows.values())
    assert parts.rows[STEPS]["ledger/trained"] == STEPS * 2 * 4


@pytest.mark.parametrize("when", ["idle", "with the publish that ended", "under way"])
def test_lost_weights_are_published_again_unless_they_just_were(run_dir: RunDir, when: str) -> None:
    """A store refuses a version that it has: the loss may be older than the publish."""
    lost = PoolEvents(weights_lost=True)
    parts = Parts()
    waits: dict[str, list[Callable[[Parts], PoolEvents]]] = {
        "idle": [lambda _: PoolEvents(), lambda _: lost],
        "with the publish that ended": [lambda _: lost],
        "under way": [lambda _: lost],
    }
    parts.script = waits[when]
    trainer(parts, run_dir).run()
    assert parts.calls.count("publish 0") == (2 if when == "idle" else 1)
    assert parts.calls.index("publish 0") < parts.calls.index("update 0")
