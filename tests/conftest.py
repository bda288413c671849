"""Options and fixtures of the whole suite, and how it is spread over processes (scripts/test)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Ray reads these when it is imported; all processes of the suite are clients of each other's Ray.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.pop("RAY_ADDRESS", None)  # tests name the Ray that they join
# Files of whole runs that join one Ray: they stay in one process. Others start a Ray themselves.
SHARING = tuple(
    f"tests/e2e/test_{name}.py"
    for name in (
        "async", "bad_input", "cluster", "data_modes", "evaluation", "job", "lora", "modes",
        "preflight", "reward_model", "rollouts",
    )
)  # fmt: skip
# The slowest folders come first, so that all processes end together.
SLOWEST = ("tests/e2e/", "tests/parity/", "tests/faults/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def _place(item: pytest.Item) -> int:
    places = [i for i, folder in enumerate(SLOWEST) if item.nodeid.startswith(folder)]
    return places[0] if places else len(SLOWEST)


class ByFile(LoadScopeScheduling):
    """A file's tests stay in one process, in order; so do those that share a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "sharing" if nodeid.startswith(SHARING) else nodeid.split("::", 1)[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Takes the place of the one named by ``--dist``."""
    return ByFile(config, log)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new directory, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
