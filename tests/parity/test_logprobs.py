"""The chunked head against softmax over the full logits, in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raygrpo.algorithm import loss as losses
from raygrpo.algorithm.logprobs import (
    ExpectedGrad,
    HeadSettings,
    LogitTransform,
    chunk_tokens_for,
    token_logprobs,
    token_logprobs_by,
)
from raygrpo.algorithm.loss import LossConfig, LossInputs, is_token_separable, policy_loss
from tests.close import relative

# fp32 sums of a few dozen terms in another order differ in the seventh digit.
RELATIVE = 1e-5
VOCABULARY, WIDTH = 37, 12

CASES = {
    "plain": HeadSettings(chunk_tokens=9),
    "temperature": HeadSettings(chunk_tokens=9, temperature=0.7),
    "softcap": HeadSettings(chunk_tokens=9, transform=LogitTransform(cap=3.0)),
    "all": HeadSettings(
        chunk_tokens=9, temperature=1.3, transform=LogitTransform(scale=0.5, cap=2.0)
    ),
}
Head = Callable[..., tuple[Tensor, Tensor]]


def full_reference(logits: Tensor, targets: Tensor, head: HeadSettings) -> tuple[Tensor, Tensor]:
    """Written from the definition, in float64."""
    scaled = logits.double() * head.transform.scale
    if head.transform.cap is not None:
        scaled = head.transform.cap * torch.tanh(scaled / head.transform.cap)
    table = torch.log_softmax(scaled / head.temperature, -1)
    return table[torch.arange(len(targets)), targets], -(table.exp() * table).sum(-1)


def problem(num_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": normal(num_tokens, WIDTH),
        "weight": normal(VOCABULARY, WIDTH),
        "bias": normal(VOCABULARY),
        "targets": torch.randint(VOCABULARY, (num_tokens,), generator=generator),
        "by_logprob": normal(num_tokens),
        "by_entropy": normal(num_tokens),
    }


def predict(given: dict[str, Tensor], calls: list[int], *, wrong: float = 0.0) -> ExpectedGrad:
    def gradient(
        which: slice | Tensor, logprobs: Tensor, entropies: Tensor
    ) -> tuple[Tensor, Tensor]:
        calls.append(len(logprobs))
        return given["by_logprob"][which] + wrong, given["by_entropy"][which]

    return gradient


def results(given: dict[str, Tensor], compute: Head, factor: float = 1.0) -> list[Tensor]:
    """Values and gradients of a weighted sum of logprobs and entropies."""
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    logprobs, entropies = compute(*leaves)
    (logprobs @ given["by_logprob"] + entropies @ given["by_entropy"]).mul(factor).backward()
    return [logprobs.detach(), entropies.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def full(given: dict[str, Tensor], head: HeadSettings) -> Head:
    def compute(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        values = full_reference(h @ w.T + b, given["targets"], head)
        return values[0].float(), values[1].float()

    return compute


def chunked(given: dict[str, Tensor], head: HeadSettings, **options: Any) -> Head:
    def compute(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        options.setdefault("entropy_gradient", True)
        return token_logprobs(h, w, given["targets"], bias=b, settings=head, **options)

    return compute


def by_any_head(given: dict[str, Tensor], head: HeadSettings) -> Head:
    def compute(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs_by(
            lambda x: x @ w.T + b, h, given["targets"], settings=head, entropy_gradient=True
        )

    return compute


def assert_same(ours: list[Tensor], expected: list[Tensor], tolerance: float = RELATIVE) -> None:
    for one, other in zip(ours, expected, strict=True):
        # An entropy near 0 is the difference of two numbers of order 1, which round by 1e-7.
        scale = max(float(other.norm()), 0.1)
        assert float((one - other).norm()) < tolerance * scale


@pytest.mark.parametrize("form", ["fused", "recomputed", "any head"])
@pytest.mark.parametrize("case", CASES)
@given(
    num_tokens=st.integers(1, 40),
    chunk=st.integers(1, 45),
    seed=st.integers(0, 99),
    factor=st.sampled_from([1.0, 3.0, -0.25]),
)
@settings(max_examples=15, deadline=None)
def test_values_and_gradients_equal_the_full_logits(
    case: str, form: str, num_tokens: int, chunk: int, seed: int, factor: float
) -> None:
    given, head = problem(num_tokens, seed), replace(CASES[case], chunk_tokens=chunk)
    calls: list[int] = []
    if form == "fused":
        compute = chunked(given, head, expected_grad=predict(given, calls))
    elif form == "recomputed":
        compute = chunked(given, head)
    else:
        compute = by_any_head(given, head)
    ours = results(given, compute, factor)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_same(ours, results(given, full(given, head), factor))
    assert sum(calls) == (num_tokens if form == "fused" else 0)


@pytest.mark.parametrize("blocks", [1, 5, 10**9])
def test_blocks_of_the_vocabulary_change_nothing(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, head = problem(25), CASES["all"]
    expected = results(given, full(given, head))
    monkeypatch.setattr("raygrpo.algorithm.logprobs._BLOCK_LOGITS", {"cpu": blocks * 9})
    assert_same(results(given, chunked(given, head)), expected)


def test_a_gradient_other_than_expected_is_recomputed() -> None:
    """What was formed in the forward pass is not used, so nothing is ever silently wrong."""
    given, head = problem(30), CASES["plain"]
    calls: list[int] = []
    # Tolerance goes by the gradients' own size.
    for scale in (1.0, 1e-4):
        scaled = {**given, **{k: given[k] * scale for k in ("by_logprob", "by_entropy")}}
        wrong = chunked(given, head, expected_grad=predict(scaled, calls, wrong=0.01 * scale))
        assert_same(results(scaled, wrong), results(scaled, full(scaled, head)))
    assert calls
    none = {**given, "by_logprob": torch.zeros(30), "by_entropy": torch.zeros(30)}
    assert_same(
        results(given, chunked(given, head, expected_grad=predict(none, calls))),
        results(given, full(given, head)),
    )
    spoilt = {**given, "by_logprob": given["by_logprob"].clone()}
    spoilt["by_logprob"][3] = math.nan
    poisoned = results(spoilt, chunked(spoilt, head, expected_grad=predict(spoilt, calls)))
    assert all(gradient.isnan().any() for gradient in poisoned[2:])


def test_entropies_carry_a_gradient_only_where_asked() -> None:
    given, head = problem(20), CASES["plain"]
    leaf = given["hidden"].requires_grad_()
    for asked in (True, False):
        _, entropies = token_logprobs(
            leaf, given["weight"], given["targets"], settings=head, entropy_gradient=asked
        )
        assert entropies.requires_grad is asked


@pytest.mark.parametrize("fused", [True, False])
def test_tied_weights_get_both_gradients(fused: bool) -> None:
    """The embedding that is also the head: its gradient is the sum over the two uses."""
    given, head = problem(30), CASES["plain"]
    options: dict[str, Any] = {"expected_grad": predict(given, [])} if fused else {}

    def tied(compute: Head) -> Head:
        return lambda h, w, b: compute(torch.tanh(w[given["targets"].flip(0)]) + 0 * h, w, b)

    ours = results(given, tied(chunked(given, head, **options)))
    expected = results(given, tied(full(given, head)))
    assert_same([ours[0], ours[3]], [expected[0], expected[3]])


class Shapes(TorchDispatchMode):
    """What is computed: matrices with a side of V, as (V, other side), and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, int]] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if not isinstance(tensor, Tensor):
                continue
            self.largest = max(self.largest, tensor.numel())
            if tensor.ndim == 2 and VOCABULARY in tensor.shape:
                first, second = tensor.shape
                self.found.add((VOCABULARY, second if first == VOCABULARY else first))
        return output


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    given = {**problem(30), "by_entropy": torch.zeros(30)}
    hidden = given["hidden"].requires_grad_()
    with Shapes() as shapes:
        logprobs, _ = token_logprobs(
            hidden,
            given["weight"],
            given["targets"],
            settings=CASES["plain"],
            expected_grad=predict(given, []),
        )
        (logprobs @ given["by_logprob"]).backward()
    assert hidden.grad is not None
    assert (VOCABULARY, WIDTH) not in shapes.found


@pytest.mark.parametrize("form", ["fused", "recomputed", "any head"])
def test_no_more_logits_than_a_chunk_exist_or_are_saved(form: str) -> None:
    """In either orientation, flat, or as many pieces."""
    num_tokens = 100
    given, head = problem(num_tokens), replace(CASES["plain"], chunk_tokens=8)
    if form == "any head":
        compute = by_any_head(given, head)
    else:
        options = {"expected_grad": predict(given, [])} if form == "fused" else {}
        compute = chunked(given, head, **options)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with Shapes() as shapes, kept:
        results(given, compute)
    assert max(other for _, other in shapes.found) == WIDTH
    leaves = [given[name].numel() for name in ("hidden", "weight", "bias")]
    assert shapes.largest == max(leaves) < num_tokens * VOCABULARY
    # What the gradient is of, the gradients formed already, and three numbers a token: its target,
    # and the expected gradients. The sum of the results is this test's own, with five more.
    assert sum(saved) <= 2 * sum(leaves) + 8 * num_tokens
    assert 2 * sum(leaves) + 8 * num_tokens < 2 * num_tokens * VOCABULARY


def test_a_bfloat16_head_is_normalised_in_float32() -> None:
    given = problem(50)
    hidden, weight = given["hidden"].bfloat16(), given["weight"].bfloat16()
    logprobs, entropies = token_logprobs(hidden, weight, given["targets"], settings=CASES["plain"])
    expected, _ = full_reference(hidden @ weight.T, given["targets"], CASES["plain"])
    assert logprobs.dtype == torch.float32
    assert relative(logprobs, expected) < RELATIVE
    assert float(entropies.min()) >= 0 and float(entropies.max()) <= math.log(VOCABULARY)


@pytest.mark.parametrize("fused", [True, False])
def test_an_fp32_head_multiplies_bfloat16_weights_in_float32(fused: bool) -> None:
    """All but the last rounding, of the gradients to their tensors' dtype, is gone."""
    rounded = {
        k: v.bfloat16() if k in ("hidden", "weight", "bias") else v for k, v in problem(50).items()
    }
    exact = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in rounded.items()}
    options: dict[str, Any] = {"expected_grad": predict(rounded, [])} if fused else {}
    head = replace(CASES["all"], fp32=True)
    ours = results(rounded, chunked(rounded, head, **options))
    expected = results(exact, full(exact, head))
    assert_same(ours[:2], expected[:2])
    assert ours[3].dtype == torch.bfloat16
    assert_same([g.float() for g in ours[2:4]], expected[2:4], 2**-8)
    rough = results(rounded, chunked(rounded, CASES["all"], **options))
    assert relative(rough[0], expected[0]) > 100 * relative(ours[0], expected[0])


def test_entropy_of_a_certain_token_is_zero() -> None:
    hidden, weight = torch.ones(3, 2), torch.tensor([[1e4, 0.0], [0.0, 0.0], [-1e4, 0.0]])
    logprobs, entropies = token_logprobs(
        hidden, weight, torch.tensor([0, 1, 2]), settings=CASES["plain"]
    )
    assert logprobs.tolist() == [0.0, -1e4, -2e4] and entropies.tolist() == [0.0] * 3


def test_chunks_shrink_with_the_vocabulary() -> None:
    assert chunk_tokens_for(262_144) == 128
    assert chunk_tokens_for(10**9) == 16


LOSSES: dict[str, dict[str, Any]] = {
    "clip": {"delta": 1.5, "dual_clip": 3.0},
    "kl and entropy bonus": {"beta": 0.1, "kl_unbiased": True, "entropy_coef": 0.05},
    "tis": {"correction": "tis"},
    "icepop": {"correction": "icepop"},
    "top entropies": {"top_entropy_frac": 0.5},
    "cispo at the sampler": {"loss": "cispo", "ratio_anchor": "sampler"},
    "sapo": {"loss": "sapo"},
    "dppo_tv": {"loss": "dppo_tv"},
    "reinforce": {"loss": "reinforce"},
}
BY_SEQUENCE: dict[str, dict[str, Any]] = {
    "gspo": {"loss": "gspo"},
    "tis by sequence": {"correction": "tis", "correction_level": "sequence"},
    "off-policy mask": {"off_policy_threshold": 0.1},
}


def loss_problem(with_old: bool) -> tuple[LossInputs, Tensor, Tensor, dict[str, Tensor]]:
    """Four sequences in two rows of eight tokens, some untrained, and hidden states of each."""
    given = problem(16, seed=5)
    generator = torch.Generator().manual_seed(6)
    mask = torch.rand(2, 8, generator=generator) < 0.8
    rows, columns = mask.nonzero(as_tuple=True)
    near = [-3 + 0.3 * torch.randn(2, 8, generator=generator) for _ in range(3)]
    inputs = LossInputs(
        logprobs=near[0],
        old_logprobs=near[0] if with_old else None,
        sampler_logprobs=near[1],
        ref_logprobs=near[2],
        entropies=None,
        loss_mask=mask,
        advantages=torch.tensor([1.0, -0.5, 0.7, -1.2]),
        sequence_ids=torch.tensor([[0] * 5 + [1] * 3, [2] * 4 + [3] * 4]),
        loss_weights=torch.tensor([0.1, 0.2, 0.15, 0.05]),
        policy_mask=torch.rand(2, 8, generator=generator) < 0.5,
    )
    return inputs, rows, columns, given


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("name", [*LOSSES, *BY_SEQUENCE])
def test_every_loss_has_the_gradient_that_the_fused_head_expects(
    name: str, with_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the learner's own way: the loss is computed once more after the head."""
    config = LossConfig(**{**LOSSES, **BY_SEQUENCE}[name])
    inputs, rows, columns, given = loss_problem(with_old)
    expected_grad = losses.expected_grad(inputs, rows, columns, config)
    assert (expected_grad is not None) == is_token_separable(config) == (name in LOSSES)
    targets, head = given["targets"][: len(rows)], replace(CASES["all"], chunk_tokens=3)
    gradients = []
    for compute in ("ours", "full"):
        h = given["hidden"][: len(rows)].clone().requires_grad_()
        w = given["weight"].clone().requires_grad_()
        if compute == "ours":
            flat = token_logprobs(
                h, w, targets, settings=head, entropy_gradient=True, expected_grad=expected_grad
            )
        else:
            flat = full_reference(h @ w.T, targets, head)
        grids = [torch.zeros(2, 8).index_put((rows, columns), values.float()) for values in flat]
        loss, _ = policy_loss(replace(inputs, logprobs=grids[0], entropies=grids[1]), config)
        if compute == "ours" and expected_grad is not None:
            # Recomputing would fail now: the gradients of the forward pass are used.
            monkeypatch.setattr("raygrpo.algorithm.logprobs.logit_chunks", None)
        loss.backward()
        gradients.append([loss.detach()[None], h.grad, w.grad])
    assert_same(*gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
def test_expecting_reads_nothing_back_from_the_device(name: str) -> None:
    """On the meta device nothing can be: statistics would wait for a GPU once a chunk."""
    config = LossConfig(**LOSSES[name])
    inputs, rows, columns, _ = loss_problem(with_old=True)
    on_meta = {
        field.name: value.to("meta")
        for field in fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor)
    }
    expected_grad = losses.expected_grad(
        replace(inputs, **on_meta), rows.to("meta"), columns.to("meta"), config
    )
    assert expected_grad is not None
    values = torch.zeros(len(rows), device="meta")
    by_logprob, by_entropy = expected_grad(slice(0, len(rows)), values, values)
    assert by_logprob.shape == values.shape
    assert (by_entropy is not None) == (config.entropy_coef > 0)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_expected_is_the_gradient_to_the_bit(name: str) -> None:
    """Of all tokens at once, of a run of them, and of some in any order."""
    config = LossConfig(**LOSSES[name])
    inputs, rows, columns, _ = loss_problem(with_old=True)
    entropies = torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    leaves = {"logprobs": inputs.logprobs.clone(), "entropies": entropies}
    for leaf in leaves.values():
        leaf.requires_grad_()
    policy_loss(replace(inputs, **leaves), config)[0].backward()
    expected_grad = losses.expected_grad(inputs, rows, columns, config)
    assert expected_grad is not None
    for which in (slice(0, len(rows)), slice(2, 5), torch.tensor([4, 0, 3])):
        given = [leaf.detach()[rows, columns][which] for leaf in leaves.values()]
        for ours, leaf in zip(expected_grad(which, *given), leaves.values(), strict=True):
            if ours is not None:
                assert leaf.grad is not None
                assert torch.equal(ours, leaf.grad[rows, columns][which])
