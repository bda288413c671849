"""The tests of the vLLM engine need vLLM: `scripts/test --vllm` runs them where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """vLLM leaves a ZeroMQ context to the garbage collector, which may run after the last test."""
    config.addinivalue_line("filterwarnings", "ignore:Unclosed context:ResourceWarning")
    # Where a test's module imports vLLM, which a mark of that module does not cover.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first, or one of two processes waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_training.py")
