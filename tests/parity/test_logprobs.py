"""The chunked head against softmax over the full logits, in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.algorithm.logprobs import chunk_tokens_for, token_logprobs
from raygrpo.models import LogitTransform

# fp32 sums of a few dozen terms in another order differ in the seventh digit.
RELATIVE = 1e-5

CASES = {
    "plain": (1.0, LogitTransform()),
    "temperature": (0.7, LogitTransform()),
    "softcap": (1.0, LogitTransform(cap=3.0)),
    "scale, softcap and temperature": (1.3, LogitTransform(scale=0.5, cap=2.0)),
}


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def full_reference(
    logits: Tensor, targets: Tensor, temperature: float, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """Written from the definition, in float64."""
    scaled = logits.double() * transform.scale
    if transform.cap is not None:
        scaled = transform.cap * torch.tanh(scaled / transform.cap)
    table = torch.log_softmax(scaled / temperature, -1)
    return table[torch.arange(len(targets)), targets], -(table.exp() * table).sum(-1)


def problem(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 12, generator=generator)
    weight = torch.randn(37, 12, generator=generator)
    targets = torch.randint(37, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator)
    return hidden, weight, targets, upstream


@pytest.mark.parametrize("case", CASES)
@given(num_tokens=st.integers(1, 40), chunk=st.integers(1, 45), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_equal_the_full_logits(
    case: str, num_tokens: int, chunk: int, seed: int
) -> None:
    temperature, transform = CASES[case]
    hidden, weight, targets, upstream = problem(num_tokens, seed)
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            logprobs, entropies = token_logprobs(
                h,
                lambda x, w=w: x @ w.T,
                targets,
                temperature=temperature,
                transform=transform,
                chunk_tokens=chunk,
            )
            assert logprobs.dtype == entropies.dtype == torch.float32
            assert not entropies.requires_grad
        else:
            logprobs, entropies = full_reference(h @ w.T, targets, temperature, transform)
        (logprobs * upstream).sum().backward()
        assert h.grad is not None and w.grad is not None
        results.append((logprobs.detach(), entropies.detach(), h.grad, w.grad))
    for ours, expected in zip(*results, strict=True):
        assert relative(ours, expected) < RELATIVE


def test_tied_weights_get_both_gradients() -> None:
    """The embedding that is also the head: its gradient is the sum over the two uses."""
    _, weight, targets, upstream = problem(30)
    gradients = []
    for chunked in (True, False):
        w = weight.clone().requires_grad_()
        hidden = torch.tanh(w[targets.flip(0)])
        if chunked:
            logprobs, _ = token_logprobs(hidden, lambda x, w=w: x @ w.T, targets, chunk_tokens=7)
        else:
            logprobs, _ = full_reference(hidden @ w.T, targets, 1.0, LogitTransform())
        (logprobs * upstream).sum().backward()
        gradients.append(w.grad)
    ours, expected = gradients
    assert ours is not None and expected is not None
    assert relative(ours, expected) < RELATIVE


def recording_head(weight: Tensor, sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def head(hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return hidden @ weight.T

    return head


def test_no_more_logits_than_a_chunk_exist_or_are_saved() -> None:
    hidden, weight, targets, upstream = problem(100)
    hidden.requires_grad_()
    sizes: list[int] = []
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2 and tensor.shape[-1] == weight.shape[0]:
            saved.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = token_logprobs(hidden, recording_head(weight, sizes), targets, chunk_tokens=8)
    assert max(sizes) == 8 and sum(sizes) == 100
    assert not saved, "the forward pass kept logits for the backward pass"
    (logprobs * upstream).sum().backward()
    assert sum(sizes) == 200, "the backward pass recomputes each chunk once"


def test_a_bfloat16_head_is_normalised_in_float32() -> None:
    hidden, weight, targets, _ = problem(50)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprobs, entropies = token_logprobs(hidden, lambda x: x @ weight.T, targets, chunk_tokens=9)
    expected, _ = full_reference(hidden @ weight.T, targets, 1.0, LogitTransform())
    assert logprobs.dtype == torch.float32
    assert relative(logprobs, expected) < RELATIVE
    assert float(entropies.min()) >= 0 and float(entropies.max()) <= math.log(37)


def test_chunks_shrink_with_the_vocabulary() -> None:
    assert chunk_tokens_for(262_144) == 128
    assert chunk_tokens_for(10**9) == 16
