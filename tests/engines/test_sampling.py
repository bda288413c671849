"""Sampling against transformers' own logits processors, and its random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raygrpo.engines.hf.sampling import draw, sample
from raygrpo.engines.randomness import row_keys, uniforms
from raygrpo.types import Sampling

ROWS, VOCABULARY, PROMPT, WRITTEN = 6, 40, 5, 3
STOP_IDS = torch.tensor([1, 7])


@pytest.fixture(autouse=True, scope="module", params=[7, 512])
def block(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test with ids in one block, and in several of which the last is shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raygrpo.engines.hf.sampling.BLOCK", request.param)
        yield


def reference(logits: Tensor, history: Tensor, sampling: Sampling) -> Tensor:
    """Logprobs [R, V] by transformers' processors in the order that ``generate`` applies them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.min_tokens:
        stops = STOP_IDS.tolist()
        processors.append(MinNewTokensLengthLogitsProcessor(PROMPT, sampling.min_tokens, stops))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores: Tensor = processors(history, logits.clone())
    return scores.log_softmax(-1)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"min_p": 0.999},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"min_tokens": WRITTEN + 1},
    {"min_tokens": WRITTEN},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3,
     "min_tokens": WRITTEN + 1},
]  # fmt: skip


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_distribution_is_that_of_transformers_processors(options: dict[str, float]) -> None:
    sampling = Sampling(num_completions=1, max_tokens=8, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * 2
    history = torch.randint(0, VOCABULARY, (ROWS, PROMPT + WRITTEN), generator=generator)
    expected = reference(logits, history, sampling)
    early = torch.full((ROWS,), sampling.min_tokens > WRITTEN)
    # A fine grid of uniforms visits the distribution as its inverse lays it out: the share of the
    # grid that maps to a token is its probability, to one grid cell.
    cells = 20000
    shares = torch.zeros(ROWS, VOCABULARY)
    for row in range(ROWS):
        grid = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        tokens, logprobs = sample(
            logits[row].expand(cells, -1),
            sampling,
            grid,
            history=history[row].expand(cells, -1),
            early=early[row].expand(cells),
            stop_ids=STOP_IDS,
        )
        shares[row] = torch.bincount(tokens, minlength=VOCABULARY) / cells
        # float32 rounding of a sum of 40 exponentials
        torch.testing.assert_close(logprobs, expected[row][tokens], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(shares, expected.exp(), atol=1.5 / cells, rtol=0)


def test_frequencies_of_the_real_random_numbers_match() -> None:
    sampling = Sampling(num_completions=1, max_tokens=1, temperature=0.9, top_p=0.95)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 2
    draws = 50_000
    numbers = uniforms(row_keys(11, "train", 4, draws), np.zeros(draws, np.int64))
    tokens, _ = sample(logits.expand(draws, -1), sampling, torch.from_numpy(numbers))
    expected = reference(logits, torch.zeros(1, 1, dtype=torch.int64), sampling)[0].exp()
    counts = torch.bincount(tokens, minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    squares = (counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])
    # chi-square with k - 1 degrees of freedom: mean k - 1, deviation sqrt(2 (k - 1)); 5 deviations
    degrees = int(kept.sum()) - 1
    assert squares.sum() < degrees + 5 * (2 * degrees) ** 0.5


def test_temperature_zero_is_greedy_with_logprob_zero() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(num_completions=1, max_tokens=1, temperature=0, top_p=0.3)
    tokens, logprobs = sample(logits, sampling, torch.rand(4, dtype=torch.float64))
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(logprobs, torch.zeros(4))


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.sampled_from([-torch.inf, -90.0, -5.0, 0.0, 3.0, 80.0]), min_size=1),
    number=st.sampled_from([0.0, 2.0**-53, 0.25, 0.5, 1 - 2.0**-24, 1 - 2.0**-53]),
)
def test_draw_never_takes_an_impossible_token(scores: list[float], number: float) -> None:
    row = torch.tensor([[*scores, 1.0, -torch.inf]])
    tokens, logprobs = draw(row, torch.tensor([number], dtype=torch.float64))
    assert 0 <= int(tokens) < row.shape[1]
    assert torch.exp(row[0, tokens] - row.max()) > 0
    expected = row.log_softmax(-1)[0, tokens]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)


def test_draw_reaches_both_ends() -> None:
    scores = torch.zeros(2, 50_000)
    tokens, _ = draw(scores, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert tokens.tolist() == [0, 49_999]


def test_uniforms_are_uniform_and_independent() -> None:
    keys = row_keys(0, "train", 0, 400)
    table = np.stack([uniforms(keys, np.full(400, position)) for position in range(250)])
    size = table.size
    assert table.min() >= 0
    assert table.max() < 1
    counts = np.bincount((table.ravel() * 100).astype(int), minlength=100)
    # chi-square with 99 degrees of freedom, 5 deviations
    assert ((counts - size / 100) ** 2 / (size / 100)).sum() < 99 + 5 * 198**0.5
    centred = table - 0.5
    for left, right in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        # a product of two independent centred uniforms has deviation 1/12
        assert abs((left * right).mean()) < 5 / 12 / left.size**0.5


def test_uniforms_depend_on_every_part_of_the_key_and_on_nothing_else() -> None:
    zeros = np.zeros(3, np.int64)
    base = uniforms(row_keys(1, "train", 2, 3), zeros)
    for other in (
        row_keys(2, "train", 2, 3),
        row_keys(1, "eval", 2, 3),
        row_keys(1, "train", 3, 3),
        row_keys(1 + 2**64, "train", 2, 3),
    ):
        assert not np.isin(uniforms(other, zeros), base).any()
    assert not np.isin(uniforms(row_keys(1, "train", 2, 3), zeros + 1), base).any()
    assert len(set(base)) == 3
    # a completion's numbers depend neither on the group's size nor on the rows beside it
    assert np.array_equal(uniforms(row_keys(1, "train", 2, 9)[[7, 2, 1]], zeros)[1:], base[[2, 1]])


def mix(value: int) -> int:
    """SplitMix64's next output from a state, in plain integers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_uniforms_equal_plain_integer_arithmetic() -> None:
    """A change of the generator changes every run; it must not happen unnoticed."""
    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    key = 0
    for part in (7, 0, 2, 3):
        key = mix(key ^ part)
    expected = [
        (mix(mix(mix(key ^ row)) ^ place) >> 11) / 2**53 for row, place in enumerate((0, 5))
    ]
    assert uniforms(row_keys(7, "eval", 3, 2), np.array([0, 5])).tolist() == expected
