"""Prompts computed together: which ones, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.engines.forward import _ALIKE, PREFILL_CHUNK, Forward, _batches
from tests.parity.test_transformers_engine import (
    KINDS,
    assert_logprobs_match,
    make_engine,
    paths,  # noqa: F401
    plain_model,
    request,
    run,
    sharing,  # noqa: F401
)
from tests.tiny import Kind


@given(lengths=st.lists(st.integers(1, 2 * PREFILL_CHUNK), max_size=30))
def test_batches_hold_all_prompts_with_little_padding(lengths: list[int]) -> None:
    batches = _batches(lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert lengths[batch[0]] == longest
        assert min(lengths[index] for index in batch) >= _ALIKE * longest
        assert len(batch) == 1 or len(batch) * longest <= PREFILL_CHUNK
    # No two could have been one: they are full, or their prompts differ.
    for one, other in pairwise(batches):
        full = (len(one) + 1) * lengths[one[0]] > PREFILL_CHUNK
        assert full or lengths[other[0]] < _ALIKE * lengths[one[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_start_together_are_computed_together(
    paths: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
) -> None:
    passes = []

    def counted(self: Forward, cache: Any, ids: Any, start: int) -> Any:
        passes.append(tuple(ids.shape))
        return causal(self, cache, ids, start)

    causal = Forward._causal
    engine = make_engine(paths(kind), max_rows=15)
    monkeypatch.setattr(Forward, "_causal", counted)
    lengths = (20, 9, 24, 18, 2)
    items = [request(n, length=length, max_tokens=20) for n, length in enumerate(lengths)]
    groups = run(engine, *items)
    assert sorted(passes) == [(1, 2), (1, 9), (3, 24)]
    for group in groups.values():
        assert_logprobs_match(plain_model(paths(kind)), group)
