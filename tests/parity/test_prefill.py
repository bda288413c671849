"""Prompts computed together: which ones, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.engines.hf.forward import _ALIKE, PREFILL_CHUNK, Forward, _batches
from raygrpo.types import Version
from tests.parity.conftest import KINDS
from tests.parity.test_transformers_engine import (
    assert_logprobs_match,
    make_engine,
    plain_model,
    publish,
    request,
    run,
)
from tests.tiny import Kind

pytestmark = pytest.mark.usefixtures("sharing")


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
    paths: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    passes = []

    def counted(self: Forward, cache: Any, ids: Any, start: int) -> Any:
        passes.append(tuple(ids.shape))
        return compute(self, cache, ids, start)

    compute = Forward.causal
    engine = make_engine(paths(kind), max_rows=15)
    monkeypatch.setattr(Forward, "causal", counted)
    lengths = (20, 9, 24, 18, 2)
    items = [request(n, length=length, max_tokens=20) for n, length in enumerate(lengths)]
    groups = run(engine, *items)
    assert sorted(passes) == [(1, 2), (1, 9), (3, 24)]
    for group in groups.values():
        assert_logprobs_match(plain_model(paths(kind)), group)


def test_padding_brings_no_other_token_into_a_prompt(paths: Callable[..., Path]) -> None:
    """Padding with an id whose embedding is not finite would spoil prompts that do not have it."""
    engine, model = make_engine(paths()), plain_model(paths())
    with torch.no_grad():
        model.model.embed_tokens.weight[:3] = torch.nan
    engine.load_weights(*publish(model, Version(0, 1)))
    groups = run(engine, request(0, length=20, max_tokens=1), request(1, length=16, max_tokens=1))
    for group in groups.values():
        assert_logprobs_match(plain_model(paths()), group)
