"""Options and fixtures of the whole suite, and how it is spread over processes (scripts/test)."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Whole runs, whose processes keep a machine busy: one at a time.
RUNS = ("tests/e2e/",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


class ByFile(LoadScopeScheduling):
    """A file's tests stay in one process, in order; so do all whole runs."""

    def _split_scope(self, nodeid: str) -> str:
        return "runs" if nodeid.startswith(RUNS) else nodeid.split("::", 1)[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Takes the place of the one named by ``--dist``."""
    return ByFile(config, log)
