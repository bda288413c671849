"""An aborted group goes on in another engine as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.types import Completion, Group, GroupRequest, Stream, Version
from tests.parity.conftest import KINDS
from tests.parity.test_transformers_engine import make_engine, plain_model, publish, request, run
from tests.tiny import Kind

pytestmark = pytest.mark.usefixtures("sharing")

# A continuation computes its tokens' keys and values at once, decoding did it one by one: float32
# sums in other orders. The largest difference seen is 2e-6; a wrong position or a lost token moves
# a logprob of these models by 0.1 and more.
TOLERANCE = 5e-5
KEY: tuple[Stream, int] = ("train", 3)


def order(**sampling: Any) -> GroupRequest:
    return request(3, num_completions=4, max_tokens=24, **sampling)


def interrupted(engine: TransformersEngine, asked: GroupRequest, steps: int) -> GroupRequest:
    """The request that continues what ``engine`` wrote in so many steps."""
    engine.submit(asked)
    for _ in range(steps):
        assert engine.step() == []
    partials = tuple(engine.abort("train", asked.group_id))
    assert engine.num_unfinished == 0
    return replace(asked, partials=partials)


def assert_same(ours: Completion, whole: Completion, kept: Completion) -> None:
    np.testing.assert_array_equal(ours.token_ids, whole.token_ids)
    assert (ours.finish, ours.text) == (whole.finish, whole.text)
    count = kept.token_ids.size
    np.testing.assert_array_equal(ours.logprobs[:count], kept.logprobs)
    np.testing.assert_allclose(ours.logprobs, whole.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.3, "min_tokens": 9}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_group_equals_an_uninterrupted_one(
    paths: Callable[..., Path], kind: Kind, sampling: dict[str, Any]
) -> None:
    path, asked = paths(kind), order(**sampling)
    whole = run(make_engine(path, deterministic=True), asked)[KEY]
    lengths = [completion.token_ids.size for completion in whole.completions]
    assert max(lengths) > 8
    for steps in (1, 7):
        resumed = interrupted(make_engine(path, deterministic=True), asked, steps)
        assert {c.finish for c in resumed.partials} >= {"abort"}
        assert max(c.token_ids.size for c in resumed.partials) == steps
        again = run(make_engine(path, deterministic=True), resumed)[KEY]
        assert again.request == asked, "the finished group's request has no partials"
        for ours, theirs, kept in zip(
            again.completions, whole.completions, resumed.partials, strict=True
        ):
            assert_same(ours, theirs, kept)
            assert ours.version_runs == theirs.version_runs


def test_two_aborts_in_a_row_beside_other_groups(paths: Callable[..., Path]) -> None:
    asked = order()
    whole = run(make_engine(paths(), deterministic=True), asked)[KEY]
    once = interrupted(make_engine(paths()), asked, 4)
    twice = interrupted(make_engine(paths()), once, 5)
    # The abort's step starts the group and writes its first token, so 4 + 5 tokens are there.
    assert max(c.token_ids.size for c in twice.partials) == 9
    finished = run(make_engine(paths()), request(0, num_completions=3), twice)
    for ours, theirs, kept in zip(
        finished[KEY].completions, whole.completions, twice.partials, strict=True
    ):
        assert_same(ours, theirs, kept)


def test_kept_tokens_keep_their_version(paths: Callable[..., Path]) -> None:
    resumed = interrupted(make_engine(paths()), order(min_tokens=12), 5)
    newer = make_engine(paths(), load=False)
    newer.load_weights(*publish(plain_model(paths("llama", 7)), Version(0, 2)))
    group: Group = run(newer, resumed)[KEY]
    for completion in group.completions:
        count = completion.token_ids.size
        assert completion.version_runs == ((Version(0, 0), 5), (Version(0, 2), count - 5))
        assert (completion.oldest, completion.newest) == (Version(0, 0), Version(0, 2))
