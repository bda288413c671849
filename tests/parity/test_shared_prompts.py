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

from raygrpo.engines.cache import SlotCache
from raygrpo.engines.shared_prompts import share_prompts, shared_prompt_attention
from tests.parity.test_transformers_engine import (
    KINDS,
    assert_logprobs_match,
    drain,
    make_engine,
    paths,  # noqa: F401
    plain_model,
    request,
    run,
)
from tests.tiny import Kind

# Of float32: roundings of sums of up to a hundred numbers. Of bfloat16: both outputs and their sum
# are rounded, by 2^-9 of their size, which is below 4.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}


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
def test_a_prompt_is_kept_once(paths: Callable[..., Path], kind: Kind) -> None:  # noqa: F811
    engine = make_engine(paths(kind), max_rows=12)
    items = [request(n, length=200 + n, num_completions=4, max_tokens=20) for n in range(7)]
    items.append(request(7, length=9, num_completions=1, max_tokens=20))
    groups = run(engine, *items)
    for group in groups.values():
        assert_logprobs_match(plain_model(paths(kind)), group)
    slots, _, prompt_room, _ = engine._prompts.layers[0].keys.shape
    rows, _, row_room, _ = engine._cache.layers[0].keys.shape
    assert (prompt_room >= 206, slots <= 4) == (True, True)
    assert (row_room <= 128, rows >= 12) == (True, True)


def test_a_slot_is_used_again(
    paths: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raygrpo.engines.shared_prompts.SHARING_PAYS", 0)
    engine = make_engine(paths(), max_rows=6)
    for number in range(5):
        engine.submit(request(number, length=5 + number, max_tokens=4 + 5 * number))
    groups = list(drain(engine))
    assert engine._prompts.layers[0].keys.shape[0] == 2
    for group in groups:
        assert_logprobs_match(plain_model(paths()), group)


@pytest.mark.parametrize("breakage", ["unaware", "refusing"])
def test_models_that_cannot_share_keep_prompts_by_row(
    paths: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    breakage: str,
) -> None:
    """Layers that ignore the shared prompts, or want what attention here does not know."""
    if breakage == "unaware":
        monkeypatch.setattr("raygrpo.engines.forward.use_shared_prompts", lambda model: None)
    else:

        def refuse(*args: Any) -> None:
            raise ValueError("attention with softcap is not known by shared prompts")

        monkeypatch.setattr("raygrpo.engines.shared_prompts.refuse_unknown", refuse)
    with caplog.at_level(logging.WARNING):
        engine = make_engine(paths())
    reason = {"unaware": "broadcast shape", "refusing": "softcap is not known"}[breakage]
    assert not engine._forward.shares_prompts
    assert engine._model.config._attn_implementation == "sdpa"
    assert re.search(f"keeps its prompt.*'llama': .*{reason}", caplog.text)
    for group in run(engine, request(0, length=20), request(1)).values():
        assert_logprobs_match(plain_model(paths()), group)
