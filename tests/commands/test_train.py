"""The stages of a run that need no actors: where it begins, and which model it exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raygrpo.checks.checked import Checked, check
from raygrpo.commands.scope import Scope, open_scope
from raygrpo.commands.train import claim, export, prepare
from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.checkpoint import Checkpoints
from raygrpo.storage.run_dir import RunDir
from raygrpo.training.state import BestSoFar
from tests import builders
from tests.storage.test_checkpoint import state
from tests.tiny import save_tiny_model

METRIC = "eval/greedy/reward"


@pytest.fixture
def scope() -> Iterator[Scope]:
    with open_scope() as scope:
        yield scope


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    save_tiny_model(tmp_path / "tiny")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = builders.config(
        run_dir=str(tmp_path / "run"),
        model={"path": str(tmp_path / "tiny")},
        data={"source": str(tmp_path / "rows.jsonl")},
        rewards=[{"func": "exact"}],
        train={"steps": 6},
        eval={"eval_steps": 2, "best": {"metric": METRIC}},
    )
    return check(config)


def commit(run_dir: RunDir, checked: Checked, step: int, best: BestSoFar) -> Path:
    """A checkpoint whose model's first weight is ``step``."""
    checkpoints = Checkpoints(run_dir.checkpoints)
    directory = checkpoints.begin(step)
    shutil.copytree(checked.config.model.path, directory / "model")
    file = directory / "model" / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).fill_(step)
    save_file(weights, file)
    known = replace(state(step), prompts=checked.prompts.state(), best=best)
    return checkpoints.commit(directory, step, known)


def test_a_run_begins_at_step_0_or_at_its_newest_checkpoint(checked: Checked, scope: Scope) -> None:
    run_dir = claim(checked, scope)
    first = prepare(checked, run_dir, None)
    assert (first.step, first.checkpoint, first.incarnation) == (0, None, 1)
    assert not first.is_complete
    asked = checked.prompts.next()
    place = commit(run_dir, checked, 2, BestSoFar(metric=METRIC))
    assert checked.prompts.next() != asked
    again = prepare(checked, run_dir, profile_step=3)
    assert (again.step, again.checkpoint, again.incarnation) == (2, place, 2)
    assert again.profile is not None and again.profile.step == 3
    with pytest.raises(ConfigError, match="no step 2 to profile"):
        prepare(checked, run_dir, profile_step=2)


def test_prompts_go_on_where_the_checkpoint_left_them(checked: Checked, scope: Scope) -> None:
    run_dir = claim(checked, scope)
    checked.prompts.next()
    commit(run_dir, checked, 2, BestSoFar(metric=METRIC))
    following = [checked.prompts.next().id for _ in range(3)]
    prepare(checked, run_dir, None)
    assert [checked.prompts.next().id for _ in range(3)] == following


def test_a_trained_run_exports_its_best_model(checked: Checked, scope: Scope) -> None:
    run_dir = claim(checked, scope)
    best = BestSoFar(metric=METRIC, step=4, value=0.5)
    for step in (4, 6):
        commit(run_dir, checked, step, best)
    prepared = prepare(checked, run_dir, None)
    assert prepared.is_complete
    assert run_dir.best_step == 4
    exported = export(checked.config, prepared, prepared.step)
    assert next(iter(load_file(exported / "model.safetensors").values())).flatten()[0] == 4
    # A row whose evaluation is still due is left to a run that trains.
    due = replace(state(6), best=best, record={"loss": 1.0})
    assert not replace(prepared, state=due).is_complete


def test_damaged_checkpoints_are_passed_over(checked: Checked, scope: Scope) -> None:
    run_dir = claim(checked, scope)
    best = BestSoFar(metric=METRIC, step=2, value=0.5)
    places = [commit(run_dir, checked, step, best) for step in (2, 4, 6)]
    (places[2] / "manifest.json").write_text("{")
    (places[0] / "manifest.json").write_text("{")
    prepared = prepare(checked, run_dir, None)
    assert prepared.checkpoint == places[1]
    assert len(prepared.refused) == 2 and "the best one" in prepared.refused[1]
    assert run_dir.best_step is None
    (places[1] / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match=r"no checkpoint of .* verifies"):
        prepare(checked, run_dir, None)
