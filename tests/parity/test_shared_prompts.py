"""Decoding behind shared prompts: attention against its definition, and when it is given up."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.engines.hf import shared_prompts
from raygrpo.engines.hf.cache import SlotCache
from raygrpo.engines.hf.shared_prompts import share_prompts, shared_prompt_attention
from raygrpo.errors import NumericError
from tests.parity.conftest import KINDS
from tests.parity.test_transformers_engine import (
    assert_logprobs_match,
    drain,
    make_engine,
    plain_model,
    request,
    run,
)
from tests.tiny import Kind

# Of float32: roundings of sums of up to a hundred numbers. Of bfloat16: both outputs and their sum
# are rounded, by 2^-9 of their size, which is below 4.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20)), min_size=1, max_size=4),
    num_alone=st.integers(0, 3),
    key_heads=st.integers(1, 2),
    repeats=st.integers(1, 3),
    window=st.sampled_from([None, 1, 4, 15]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_attention_equals_the_definition(
    sizes: list[tuple[int, int]],
    num_alone: int,
    key_heads: int,
    repeats: int,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Slots of 1 to 5 rows behind 1 to 20 tokens, in any order, beside rows in no slot."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    counts = [count for count, _ in sizes]
    slots = np.concatenate([np.repeat(rng.permutation(len(sizes)), counts), [-1] * num_alone])
    slots = rng.permutation(slots.astype(np.int64))
    lengths = np.array([length for _, length in sizes])
    bases = np.where(slots >= 0, lengths[slots], 0)
    written = rng.integers(1, 12, slots.size)
    stop, longest = int(written.max()), int(bases.max())
    width = 8
    cache = SlotCache(1)
    layer = cache.layers[0]
    layer.keys, layer.values = (draw(len(sizes) + 1, key_heads, 32, width) for _ in range(2))
    layer.is_initialized = True
    query = draw(slots.size, key_heads * repeats, 1, width)
    key, value = (draw(slots.size, key_heads, stop, width) for _ in range(2))
    now = bases + written - 1
    prompts = share_prompts(cache.layers, slots, bases)
    assert prompts is not None
    assert prompts.length == longest
    ago = now[:, None] - np.concatenate(
        [np.tile(np.arange(longest), (slots.size, 1)), bases[:, None] + np.arange(stop)], 1
    )
    seen = ago >= 0
    seen[:, :longest] &= np.arange(longest) < bases[:, None]
    if window is not None:
        seen &= ago < window
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(
        ~torch.from_numpy(seen), torch.finfo(dtype).min
    )[:, None, None]
    found, _ = shared_prompt_attention(
        SimpleNamespace(layer_idx=0), query, key, value, mask, prompts=prompts, scaling=0.3
    )
    for row, slot in enumerate(slots):
        whole_key, whole_value = (
            torch.cat([kept[slot, :, :longest], own[row]], 1)[:, seen[row]].double()
            for kept, own in ((layer.keys, key), (layer.values, value))
        )
        whole_key, whole_value = (t.repeat_interleave(repeats, 0) for t in (whole_key, whole_value))
        weights = (0.3 * query[row].double() @ whole_key.mT).softmax(-1)
        expected = (weights @ whole_value)[:, 0]
        off = float((found[row, 0].double() - expected).abs().max())
        assert off <= TOLERANCE[dtype], (row, off)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_kept_once(paths: Callable[..., Path], kind: Kind) -> None:
    engine = make_engine(paths(kind), max_rows=12)
    items = [request(n, length=200 + n, num_completions=4, max_tokens=20) for n in range(7)]
    items.append(request(7, length=9, num_completions=1, max_tokens=20))
    groups = run(engine, *items)
    for group in groups.values():
        assert_logprobs_match(plain_model(paths(kind)), group)
    slots, _, prompt_room, _ = engine.prompts.layers[0].keys.shape
    rows, _, row_room, _ = engine.cache.layers[0].keys.shape
    assert (prompt_room >= 206, slots <= 6) == (True, True)
    assert (row_room <= 128, rows >= 12) == (True, True)


def test_slots_in_use_are_the_first_ones(
    paths: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first group ends first, and the last one's prompt takes its place."""
    monkeypatch.setattr("raygrpo.engines.hf.shared_prompts.SHARING_PAYS", 0)
    engine = make_engine(paths(), max_rows=9)
    model = plain_model(paths())
    for number, tokens in enumerate((3, 30, 20)):
        engine.submit(request(number, length=30 - 9 * number, max_tokens=tokens))
    groups = []
    while not groups:
        groups += engine.step()
    assert groups[0].request.group_id == 0
    rows = slice(engine.rows.num_rows)
    assert set(engine.rows.slot[rows][engine.rows.base[rows] == 12].tolist()) == {0}
    engine.submit(request(3, length=4, max_tokens=9))
    groups += list(drain(engine))
    assert len(groups) == 4
    assert engine.prompts.layers[0].keys.shape[0] == 3
    for group in groups:
        assert_logprobs_match(model, group)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_group_spoils_no_row_beside_it(
    paths: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Neither one that shares another prompt, nor one in no slot, nor a prompt that comes later."""
    monkeypatch.setattr("raygrpo.engines.hf.shared_prompts.SHARING_PAYS", 60)
    engine = make_engine(paths(), max_rows=12)
    model = plain_model(paths())
    for number, length in enumerate((35, 40, 6)):
        engine.submit(request(number, length=length))
    engine.step()
    assert engine.rows.slot[:9].tolist() == [0] * 3 + [1] * 3 + [-1] * 3
    with torch.inference_mode():
        engine.prompts.layers[0].keys[broken] = torch.nan
    with pytest.raises(NumericError, match=f"group train/{broken}: "):
        engine.step()
    engine.submit(request(3, length=31))
    groups = list(drain(engine))
    assert sorted(group.request.group_id for group in groups) == [1 - broken, 2, 3]
    for group in groups:
        assert_logprobs_match(model, group)


@pytest.mark.parametrize("breakage", ["unaware", "refusing", "wrong"])
def test_models_that_cannot_share_keep_prompts_by_row(
    paths: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    breakage: str,
) -> None:
    """Layers that ignore shared prompts, want what is not known there, or get it wrong."""
    if breakage == "unaware":
        monkeypatch.setattr("raygrpo.engines.hf.forward.use_shared_prompts", lambda model: None)
    elif breakage == "wrong":
        attend = shared_prompts.attend
        monkeypatch.setattr(
            shared_prompts, "attend", lambda *a: (attend(*a)[0], 0.5 * attend(*a)[1])
        )
    else:

        def refuse(*args: Any) -> None:
            raise ValueError("attention with softcap is not known by shared prompts")

        monkeypatch.setattr("raygrpo.engines.hf.shared_prompts.refuse_unknown", refuse)
    with caplog.at_level(logging.WARNING):
        engine = make_engine(paths())
    reasons = {
        "unaware": "must match the size",
        "refusing": "softcap is not known",
        "wrong": r"logits are 0\.\d+ off",
    }
    assert not engine.forward.shares_prompts
    assert engine.model.config._attn_implementation == "sdpa"
    assert re.search(f"keeps its prompt.*'llama': .*{reasons[breakage]}", caplog.text)
    for group in run(engine, request(0, length=20), request(1)).values():
        assert_logprobs_match(plain_model(paths()), group)
