"""One Ray for the whole runs of this folder that can share it, in one process, in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import runs
from tests.e2e.head import Head, answers


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head that lives as long as the tests of this folder."""
    head = Head()
    try:
        runs.wait_for(head.process, lambda: answers(head.address), "the head")
        yield head
    finally:
        head.end()


@pytest.fixture(scope="module")
def shared_ray(head: Head) -> Iterator[Head]:
    """The module's runs join this Ray: a Ray of their own costs each of them 5 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.SHARED, "RAY_ADDRESS", head.address)
        yield head
