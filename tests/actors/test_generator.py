"""The generator's loop between asynchronous calls and its engine's thread, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from raygrpo.actors import generator
from raygrpo.actors.generator import GeneratorActor
from raygrpo.types import Group, GroupRequest, Version
from tests import builders
from tests.builders import completion, group, request

TIMEOUT_S = 30.0


class OneStepEngine:
    """Finishes in a step what was submitted before it, and keeps how many groups that were."""

    version = Version(1, 0)

    def __init__(self, on_submit: Callable[[], object]) -> None:
        self.waiting: list[GroupRequest] = []
        self.step_sizes: list[int] = []
        self._on_submit = on_submit

    @property
    def can_step(self) -> bool:
        return bool(self.waiting)

    def submit(self, request: GroupRequest) -> None:
        self.waiting.append(request)
        self._on_submit()

    def step(self) -> list[Group]:
        self.step_sizes.append(len(self.waiting))
        done, self.waiting = self.waiting, []
        return [group(order, [completion([1])] * 2) for order in done]


async def asked_while_the_first_is_submitted(num_groups: int) -> list[int]:
    """The sizes of the steps, where all calls but one come after the engine took the first."""
    loop = asyncio.get_running_loop()
    taken = asyncio.Event()
    engine = OneStepEngine(lambda: loop.call_soon_threadsafe(taken.set))
    config = builders.config()

    def make_engine(*_: Any, **__: Any) -> Any:
        return engine

    # Groups within a second count as together, so that a busy machine's event loop comes in time.
    actor = GeneratorActor(config, None, 1, make_engine=make_engine, together_s=1.0)
    await actor.start(None)
    answers = [asyncio.ensure_future(actor.generate(request(0)))]
    await asyncio.wait_for(taken.wait(), TIMEOUT_S)
    answers += [asyncio.ensure_future(actor.generate(request(i))) for i in range(1, num_groups)]
    for report, written in await asyncio.wait_for(asyncio.gather(*answers), TIMEOUT_S):
        assert isinstance(written, Group)
        assert report.group_id == written.request.group_id
    return engine.step_sizes


def test_groups_that_are_asked_for_together_start_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "on_sigterm", lambda _: None)
    monkeypatch.setattr(generator, "keep_heap", lambda: None)
    assert asyncio.run(asked_while_the_first_is_submitted(4)) == [4]
