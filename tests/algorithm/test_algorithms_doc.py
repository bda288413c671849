"""docs/algorithms.md names tests that exist, and every name of the configuration and recipe."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

from raygrpo.config.algorithm import AdvantageSection, LossSection
from raygrpo.config.recipes import RECIPES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "algorithms.md").read_text()


def test_the_tests_that_it_names_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 40
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (file, test)
    assert TEXT.count("::") == len(named), "each is written as `file::test`"


def test_it_names_what_can_be_chosen() -> None:
    rows = {line.split("|")[1].strip() for line in TEXT.splitlines() if line.startswith("| ")}
    fields = {**LossSection.model_fields, **AdvantageSection.model_fields}
    for name in ("loss", "aggregation"):
        assert set(get_args(fields[name].annotation)) <= rows
    assert set(RECIPES) <= rows
    scales = {row.partition(" / ")[2] for row in rows}
    assert set(get_args(fields["scale"].annotation)) <= scales
    for baseline in get_args(fields["baseline"].annotation):
        assert any(row.startswith(f"{baseline} /") for row in rows)
    words = set(re.findall(r"\w+", TEXT))
    assert {name for name in fields if name not in words} == set()
