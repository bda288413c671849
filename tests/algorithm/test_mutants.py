"""The tests notice when the algorithm is broken on purpose (tests/mutants.py)."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.mutants import EQUIVALENT, MODULES, REPOSITORY, all_mutants, chosen_mutants, mutants_of


def test_a_line_has_its_mutants() -> None:
    """An operator, a bound, a dropped clamp and a sign, each alone."""
    source = "def f(x, mask):\n    return -(x.clamp(max=2) * g(mask)) if x > 1 else x - 1\n"
    changed = {mutant.source.splitlines()[1].strip() for mutant in mutants_of("m", source)}
    assert changed == {
        "return x - 1 if x > 1 else -(x.clamp(max=2) * g(mask))",
        "return -(x.clamp(max=2) * g(mask)) if x <= 1 else x - 1",
        "return +(x.clamp(max=2) * g(mask)) if x > 1 else x - 1",
        "return -(x.clamp(max=2) / g(mask)) if x > 1 else x - 1",
        "return -(x.clone() * g(mask)) if x > 1 else x - 1",
        "return -(x.clamp(max=2) * g(torch.ones_like(mask))) if x > 1 else x - 1",
        "return -(x.clamp(max=2) * g(mask)) if x > 1 else x + 1",
        "return -(x.clamp(max=2) * g(mask)) if x > 1 else x - 0",
    }


def test_every_module_has_mutants_and_reasons_are_of_some() -> None:
    found = all_mutants()
    assert {mutant.module for mutant in found} == set(MODULES)
    assert set(EQUIVALENT) <= {mutant.name for mutant in found}
    for mutant in chosen_mutants(quick=True):
        ast.parse(mutant.source)


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.mutants", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_some_mutants_are_noticed() -> None:
    """A handful; the rest is for --slow."""
    run("--quick")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_noticed() -> None:
    run()
