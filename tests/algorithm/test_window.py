from __future__ import annotations

import pickle
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.algorithm.ledger import TokenLedger, buffered_tokens
from raygrpo.algorithm.window import Window, WindowState
from raygrpo.config.sections import TrainSection
from raygrpo.types import FinishedGroup, Version
from tests.builders import finished, request

SIGNAL, NO_SIGNAL, ERRORED = [1.0, 0.0], [1.0, 1.0], ["boom", "boom"]


@dataclass
class Simulation:
    """A trainer without processes: groups finish, are lost, or fail in random order."""

    rng: random.Random
    steps: int
    size: int
    staleness: int
    refill: bool
    factor: float
    outcome: dict[int, str] = field(default_factory=dict)
    trained: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    taken_steps: list[list[int]] = field(default_factory=list)
    refills: dict[int, int] = field(default_factory=dict)
    ledger: TokenLedger = field(default_factory=TokenLedger)
    step: int = 0

    @property
    def section(self) -> TrainSection:
        return TrainSection(
            groups_per_step=self.size,
            dynamic_sampling=self.refill,
            max_refill_factor=self.factor,
        )

    def window(self, state: WindowState | None = None) -> Window:
        return Window(
            steps=self.steps,
            groups_per_step=self.size,
            max_staleness=self.staleness,
            max_refills=self.section.max_refills,
            state=state,
        )

    def run(self, window: Window, until: int, budget: int = 20_000) -> Window:
        """Trains to step ``until``; in flight are ``{group id: version when submitted}``."""
        flying = {r.group_id: self.step for r in window.pending}
        while self.step < until:
            budget -= 1
            assert budget > 0, "the window waits for ever"
            while window.has_room(self.step):
                order = window.admit(request(window.admitted, step=self.step))
                flying[order.group_id] = self.step
            if window.step_ready() and self.rng.random() < 0.7:
                self._train(window)
                continue
            if flying:
                self._advance(window, flying)
            assert self.ledger.unexplained(buffered_tokens(window.buffered)) == 0
        return window

    def _train(self, window: Window) -> None:
        groups = window.take_step()
        ids = [g.summary.group_id for g in groups]
        self.taken_steps.append(ids)
        for group in groups:
            assert all(self.step - v.step <= self.staleness for v in group.summary.oldest)
            assert group.summary.group_id not in self.trained
            self.trained[group.summary.group_id] = self.step
            self.ledger = self.ledger.take(group.summary, group.summary.num_loss_tokens)
        self.step += 1

    def _advance(self, window: Window, flying: dict[int, int]) -> None:
        group_id = self.rng.choice(sorted(flying))
        chance = self.rng.random()
        if chance < 0.15:
            self.ledger = self.ledger.lose(1)  # its worker died: the pool sends the group again
            return
        version = flying.pop(group_id)
        if chance < 0.2:
            self.dropped.append(group_id)
            decided = window.fail(group_id)
        else:
            kind = self.outcome.setdefault(
                group_id, self.rng.choices(["s", "n", "e"], [0.5, 0.4, 0.1])[0]
            )
            rewards = {"s": SIGNAL, "n": NO_SIGNAL, "e": ERRORED}[kind]
            group = self._written(finished(group_id, rewards), version)  # type: ignore[arg-type]
            self.ledger = self.ledger.report(group.summary)
            decided = window.finish(group)
            assert window.finish(group) == []  # a duplicate changes nothing
        self._count(decided)

    def _written(self, group: FinishedGroup, submitted: int) -> FinishedGroup:
        """Versions land while a group is written: its oldest tokens are of any since it began."""
        summary = group.summary
        starts = [self.rng.randint(submitted, self.step) for _ in summary.scores]
        newest = [self.rng.randint(start, self.step) for start in starts]
        summary = replace(
            summary,
            oldest=tuple(Version(1, step) for step in starts),
            newest=tuple(Version(1, step) for step in newest),
        )
        return replace(group, summary=summary)

    def _count(self, decided: list[FinishedGroup]) -> None:
        self.ledger = self.ledger.decide(decided)
        self.dropped += [group.summary.group_id for group in decided if group.fate != "kept"]


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "steps": st.integers(1, 6),
        "size": st.integers(1, 5),
        "staleness": st.integers(0, 4),
        "refill": st.booleans(),
        "factor": st.sampled_from([1.0, 1.5, 3.0]),
    }
)


@settings(max_examples=200, deadline=None)
@given(case=CASES)
def test_no_trained_group_is_too_old_and_none_is_lost(case: dict[str, object]) -> None:
    simulation = Simulation(rng=random.Random(case.pop("seed")), **case)  # type: ignore[arg-type]
    window = simulation.run(simulation.window(), simulation.steps)
    order = [group_id for ids in simulation.taken_steps for group_id in ids]
    assert order == sorted(order), "steps take groups in order of admission"
    assert all(len(ids) == simulation.size for ids in simulation.taken_steps)
    fates = [*order, *simulation.dropped, *(r.group_id for r in window.pending)]
    assert sorted(fates) == list(range(window.admitted)), "each group has exactly one fate"
    assert window.pending == (), "no group is admitted that no step can take"


@settings(max_examples=100, deadline=None)
@given(case=CASES, cut=st.integers(0, 5))
def test_a_resumed_window_goes_on(case: dict[str, object], cut: int) -> None:
    simulation = Simulation(rng=random.Random(case.pop("seed")), **case)  # type: ignore[arg-type]
    window = simulation.run(simulation.window(), min(cut, simulation.steps))
    state = pickle.loads(pickle.dumps(window.state()))
    simulation.ledger = simulation.ledger.roll_back(buffered_tokens(window.buffered))
    resumed = simulation.run(simulation.window(state), simulation.steps)
    order = [group_id for ids in simulation.taken_steps for group_id in ids]
    assert order == sorted(order)
    assert sorted([*order, *simulation.dropped]) == list(range(resumed.admitted))


def test_refill_is_bounded_for_each_step() -> None:
    window = Window(steps=2, groups_per_step=2, max_refills=2)
    fates = []
    for _ in range(8):
        if not window.has_room(0):
            break
        order = window.admit(request(window.admitted))
        fates += [group.fate for group in window.finish(finished(order.group_id, NO_SIGNAL))]
    # Two places are freed; the next two groups keep theirs and make up the step.
    assert fates == ["no_signal", "no_signal", "kept", "kept"]
    window.take_step()
    order = window.admit(request(window.admitted))
    (group,) = window.finish(finished(order.group_id, NO_SIGNAL))
    assert group.fate == "no_signal", "a new budget"


def test_decisions_wait_for_earlier_groups() -> None:
    window = Window(steps=1, groups_per_step=2, max_refills=16)
    for group_id in (0, 1):
        window.admit(request(group_id))
    assert window.finish(finished(1, NO_SIGNAL)) == []
    assert not window.has_room(0)
    decided = window.finish(finished(0, SIGNAL))
    assert [group.fate for group in decided] == ["kept", "no_signal"]
    assert window.has_room(0)


def test_on_policy_admits_exactly_one_step() -> None:
    window = Window(steps=5, groups_per_step=3)
    for group_id in range(3):
        window.admit(request(group_id))
    assert not window.has_room(0)
    assert window.has_room(1)


def test_taking_too_early_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step"):
        Window(steps=1, groups_per_step=1).take_step()


def test_ledger_by_hand() -> None:
    from tests.builders import summary

    group = summary(0, [1.0, None, "boom", 0.5], lengths=[4, 5, 6, 7])
    ledger = TokenLedger().report(group).take(group, [4, 5, 6, 0])
    assert (ledger.reported, ledger.trained, ledger.masked, ledger.errored) == (22, 4, 12, 6)
    assert ledger.unexplained(0) == 0
    assert TokenLedger().report(group, awaited=False).aborted == 22
