"""The tests notice when the algorithm is broken on purpose (tests/mutate_losses.py)."""

from __future__ import annotations

import pytest

from tests.mutate_losses import MUTANTS, REPOSITORY, TESTS, main


def test_every_mutant_still_has_its_place() -> None:
    for mutant in MUTANTS:
        assert mutant.module in TESTS
        text = (REPOSITORY / mutant.path).read_text()
        assert text.count(mutant.old) == 1, mutant.name
        assert mutant.new != mutant.old
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([])
    assert code == 0, capsys.readouterr().out
