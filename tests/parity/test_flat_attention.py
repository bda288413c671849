"""Attention by one kernel over a row of tokens, as GPUs have it, against attention by batches.

On a CPU torch computes flex attention from its definition, which a test may use for gradients
too, or compiles its forward pass. No machine with a GPU has run these tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from raygrpo.learner import inputs as learner_inputs
from raygrpo.learner.attention import flex
from raygrpo.learner.attention.flex import FlatRow, LayerKind, block_pairs, make_flat_row
from raygrpo.learner.attention.segments import (
    SegmentAttention,
    SegmentPlan,
    attend_in_batches,
    both_ways,
    make_plan,
)
from raygrpo.learner.inputs import tree_layout
from tests.close import relative
from tests.parity.test_segments import (
    GROUPS,
    KINDS,
    RELATIVE,
    Layer,
    Lengths,
    Recorder,
    make_groups,
    microbatches,
    segment_arrays,
)
from tests.tiny import save_tiny_model

CPU = torch.device("cpu")
ROWS = st.lists(GROUPS, min_size=1, max_size=3)
WINDOWS = st.sampled_from([None, 1, 3, 10])
# One whole block of a prompt and more, completions shorter and longer than a block, a lone sample.
MIXED: list[Lengths] = [[(150, [20, 140, 7]), (5, [30])], [(60, [200])]]
KIND = LayerKind(CPU, torch.float32, 4, 2, 16, None)


@pytest.fixture
def by_definition(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention uncompiled, with gradients, which torch checks for on a CPU and refuses."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_flex_attention", lambda: torch_flex.flex_attention)
    with warnings.catch_warnings():
        # Of tracing, within torch.
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at first use finds no difference."""
    monkeypatch.setattr(flex, "disagreement", lambda *_: None)


@given(rows=ROWS, window=WINDOWS)
@settings(max_examples=60, deadline=None)
def test_pairs_of_tokens_and_of_blocks_are_those_of_the_layout(
    rows: list[Lengths], window: int | None
) -> None:
    arrays = segment_arrays(rows)
    layout = tree_layout(*arrays, CPU)
    near = layout.positions[:, :, None] - layout.positions[:, None, :] < (window or 10**9)
    allowed = torch.block_diag(*(layout.allowed() & near)).bool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 8)
        row = make_flat_row(*arrays, CPU)
        some, every = block_pairs(row, window)
        mask = row.mask(window)
    index = torch.arange(len(row.segments))
    assert len(index) % 8 == 0
    seen = row.sees(window)(0, 0, index[:, None], index[None])
    count = arrays[0].size
    real = torch.from_numpy(arrays[1]).ravel() >= 0
    assert (seen[:count, :count][real] == allowed[real]).all()
    # What pads sees itself alone: no row of the softmax is empty.
    padding = torch.cat([~real, torch.ones(len(index) - count, dtype=torch.bool)])
    assert (seen[padding] == torch.eye(len(index), dtype=torch.bool)[padding]).all()
    assert not seen[:count][real][:, padding].any()
    blocks = seen.view(len(some), 8, len(some), 8).transpose(1, 2)
    assert (some | ~blocks.flatten(2).any(-1)).all()
    assert (~every | blocks.flatten(2).all(-1)).all()
    assert not (every & ~some).any()
    # As torch reads it: partial and full blocks together are the first, each once.
    partial_blocks = mask.to_dense()[0, 0].bool()
    assert (partial_blocks == some).all()
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == int(some.sum())
    assert int(mask.full_kv_num_blocks.sum()) == int(every.sum())


def test_blocks_are_hardly_more_than_those_that_hold_a_pair() -> None:
    """4 groups of a prompt of 500 and 4 completions of 300, against torch's exact list."""
    arrays = segment_arrays([[(500, [300] * 4)] * 4])
    row = make_flat_row(*arrays, CPU)
    for window in (None, 200):
        some, every = block_pairs(row, window)
        exact = torch_flex.create_block_mask(
            row.sees(window), 1, 1, *[len(row.segments)] * 2, device=CPU
        )
        wanted = int(exact.kv_num_blocks.sum() + exact.full_kv_num_blocks.sum())
        # Within a window, a block that holds several segments counts with the latest position.
        assert int(some.sum()) <= (1.0 if window is None else 1.25) * wanted
        assert int(every.sum()) >= 0.85 * int(exact.full_kv_num_blocks.sum())
        assert int(some.sum()) < 0.15 * some.numel()


def attended(
    plan: SegmentPlan,
    inputs: list[Tensor],
    upstream: Tensor,
    window: Any,
    attention: SegmentAttention,
) -> Any:
    """Output where tokens are, and gradients."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    mark = torch.zeros(1).expand(1, 1, 1, (window or 0) + 1)
    q, k, v = (t.transpose(1, 2) for t in leaves)
    output, _ = attention(Layer(), q, k, v, mark, segments=plan, scaling=0.3)
    (output * upstream).sum().backward()
    return [output * (upstream != 0), *(leaf.grad for leaf in leaves)]


def example(rows: list[Lengths], heads: int, key_heads: int, seed: int) -> Any:
    """Plans by batches and for one kernel; query, key, value, and upstream gradients of tokens."""
    arrays = segment_arrays(rows)
    plan = make_plan(*arrays, CPU)
    assert plan.row is None
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(*arrays[0].shape, n, 16, generator=generator)
        for n in (heads, key_heads, key_heads, heads)
    ]
    tensors[3][torch.from_numpy(arrays[1]) < 0] = 0
    flat = SegmentPlan(plan.gather, plan.batches, make_flat_row(*arrays, CPU))
    return plan, flat, tensors[:3], tensors[3]


@pytest.mark.usefixtures("by_definition", "accepted")
@given(
    rows=ROWS,
    window=WINDOWS,
    heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    seed=st.integers(0, 9),
)
@settings(max_examples=6, deadline=None)
def test_one_kernel_equals_batches_in_value_and_gradient(
    rows: list[Lengths], window: int | None, heads: tuple[int, int], seed: int
) -> None:
    plan, flat, inputs, upstream = example(rows, *heads, seed)
    attention = SegmentAttention()
    expected = attended(plan, inputs, upstream, window, attention)
    found = attended(flat, inputs, upstream, window, attention)
    for mine, other in zip(found, expected, strict=True):
        # fp32 sums in another order; where a window is 1, gradients are sums that vanish.
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Of torch's compiler.
def test_the_compiled_kernel_computes_listed_blocks_alone() -> None:
    """Torch's kernel for CPUs, forward, in one shape: compiling it takes half a minute."""
    plan, flat, inputs, _ = example(MIXED, 4, 2, 0)
    q, k, v = (t.transpose(1, 2) for t in inputs)
    real = torch.from_numpy(segment_arrays(MIXED)[1]) >= 0
    with torch.no_grad():
        for window in (None, 30):
            expected = attend_in_batches(plan, q, k, v, window, 0.3)[real]
            found = flex.attend(flat.row, q, k, v, window, 0.3)[real]
            assert relative(found, expected) < RELATIVE
        # Without the first block of what the others may see, it is something else.
        mask = flat.row.mask(None)
        mask.kv_num_blocks[0, 0, 1:] -= 1
        wrong = flex.attend(flat.row, q, k, v, None, 0.3)[real]
        assert relative(wrong, expected) > 0.01


@pytest.mark.usefixtures("by_definition")
def test_the_comparison_at_first_use_accepts_it() -> None:
    assert flex.disagreement(KIND, partial(both_ways, None)) is None


def _later(first: Any) -> Any:
    return lambda q, k, v, window: first(q, k, v, window) * 1.05


def _windowless(first: Any) -> Any:
    return lambda q, k, v, window: first(q, k, v, None)


def _without_gradient(first: Any) -> Any:
    return lambda q, k, v, window: first(q, k.detach() + 0 * k, v, window)


@pytest.mark.parametrize("change", [_later, _windowless, _without_gradient])
def test_the_comparison_at_first_use_refuses_what_differs(change: Any) -> None:
    def ways(*arrays: Any) -> Any:
        _, second = both_ways(None, *arrays)
        return change(second), second

    found = flex.disagreement(KIND, ways)
    assert found is not None
    assert found.startswith("differs by")


@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize("when", ["at first", "later"])
def test_what_cannot_be_compiled_is_computed_in_batches_and_said_once(
    when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(*_: Any) -> Any:
        calls.append(1)
        raise RuntimeError("no compiler")

    compiled = torch.compile(torch_flex.flex_attention, fullgraph=True, backend=fail)
    monkeypatch.setattr(flex, "_flex_attention", lambda: compiled)
    plan, flat, inputs, upstream = example(MIXED, 4, 2, 0)
    if when == "later":
        monkeypatch.setattr(flex, "disagreement", lambda *_: None)
    attention = SegmentAttention()
    for window in (None, 30):
        expected = attended(plan, inputs, upstream, window, attention)
        found = attended(flat, inputs, upstream, window, attention)
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    assert len(calls) == 1
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "since flex attention fails: BackendCompilerFailed" in record.getMessage()
    assert "no compiler" in record.getMessage()


def test_memory_that_runs_out_is_no_reason_to_change_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(flex, "_flex_attention", lambda: fail)
    for known in (False, True):
        _, flat, inputs, upstream = example(MIXED, 4, 2, 0)
        if known:
            monkeypatch.setattr(flex, "disagreement", lambda *_: None)
        with pytest.raises(torch.OutOfMemoryError):
            attended(flat, inputs, upstream, None, SegmentAttention())


@pytest.mark.usefixtures("by_definition")
def test_the_comparison_may_run_while_activations_are_checkpointed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "raygrpo")
    attention = SegmentAttention()
    plan, flat, inputs, upstream = example([[(9, [4, 5])]], 4, 2, 0)
    mark = torch.zeros(1, 1, 1, 1)
    found = []
    for which in (plan, flat):
        leaves = [t.clone().requires_grad_() for t in inputs]

        def layer(*tensors: Tensor, which: SegmentPlan = which) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in tensors)
            return attention(Layer(), q, k, v, mark, segments=which, scaling=0.3)[0]

        output = checkpoint(layer, *leaves, use_reentrant=False)
        (output * upstream).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert caplog.text.count("attention by flex attention in") == 1
    for mine, other in zip(*found, strict=True):
        assert relative(mine, other) < RELATIVE  # type: ignore[arg-type]


@pytest.mark.usefixtures("by_definition", "accepted")
@pytest.mark.parametrize("kind", KINDS)
def test_models_learn_the_same_by_one_kernel(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole update, as on a device whose plans have a row; gemma3 has layers with windows."""
    path = save_tiny_model(tmp_path / kind, kind)
    made = make_groups([(9, [7, 3]), (4, [5])], 3)
    expected = Recorder(path, "packed")
    expected.update([microbatches(*made, "packed", 100)])

    def with_row(*arrays: Any) -> SegmentPlan:
        plan = make_plan(*arrays)
        return SegmentPlan(plan.gather, plan.batches, make_flat_row(*arrays))

    calls = []

    def counted(row: FlatRow, *given: Any) -> Tensor:
        calls.append(row)
        return attend(row, *given)

    attend = flex.attend
    monkeypatch.setattr(learner_inputs, "make_plan", with_row)
    monkeypatch.setattr(flex, "attend", counted)
    learner = Recorder(path, "packed")
    learner.update([microbatches(*made, "packed", 100)])
    assert calls
    assert relative(learner.gradients[0], expected.gradients[0]) < RELATIVE
