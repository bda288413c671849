"""The tests notice when the algorithm is broken on purpose (tests/mutate_losses.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mutate_losses import MUTANTS, QUICK, REPOSITORY, TESTS


def test_every_mutant_still_has_its_place() -> None:
    for mutant in MUTANTS:
        assert mutant.module in TESTS
        for edit in mutant.edits:
            text = (REPOSITORY / edit.path).read_text()
            assert text.count(edit.old) == 1, mutant.name
            assert edit.new != edit.old
    names = {mutant.name for mutant in MUTANTS}
    assert len(names) == len(MUTANTS)
    assert names >= set(QUICK)


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.mutate_losses", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_some_mutants_are_noticed() -> None:
    """One of each kind; the rest is for --slow."""
    run("--quick")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_noticed() -> None:
    run()
