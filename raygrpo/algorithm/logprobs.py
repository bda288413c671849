"""Token logprobs and entropies from hidden states, without ever holding all tokens' logits.

Logits exist for ``chunk_tokens`` tokens at a time, transposed ([V, n]): all three matrix products
then read the head's weight where it lies. Elementwise work goes through a chunk in blocks that fit
a cache, so that a chunk needs little more memory than its logits in the head's dtype.

The gradient of hidden states and weight has two forms.

*Fused.* Where the loss is a sum over tokens, a token's logprob and entropy already determine their
own gradients (`ExpectedGrad`). The forward pass then forms the gradients of hidden states and
weight chunk by chunk, from logits that it holds anyway:

    forward   logits -> logprob, entropy -> expected_grad -> gradients of hidden and weight (kept)
    loss      ... the caller computes the loss from all logprobs and entropies ...
    backward  arriving gradient = factor x expected_grad?   yes: kept gradients x factor
                                                            no:  recompute

*Recomputed.* Without an expected gradient, or where another one arrives, the backward pass forms
the logits again: a fourth matrix product beside three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float

    from raygrpo.algorithm.shapes import (
        FloatChunk,
        FloatN,
        FloatNH,
        FloatV,
        FloatVH,
        IntChunk,
        IntN,
    )

# Logits that a chunk may hold: 64 MiB in bfloat16, 128 MiB in float32.
MAX_CHUNK_LOGITS = 2**25
# Logits of a block in float32: 2 MiB on a CPU, so that five passes over it stay in its cache.
_BLOCK_LOGITS = {"cpu": 2**19}
_LARGE_BLOCK_LOGITS = 2**26
# An expected gradient differs from the arriving one by the rounding of a factor at most.
_TOLERANCE = 1e-5


class ExpectedGrad(Protocol):
    """The gradients that a loss will give to logprobs and entropies, up to a common factor."""

    def __call__(
        self, which: slice | IntChunk, logprobs: FloatChunk, entropies: FloatChunk, /
    ) -> tuple[FloatChunk, FloatChunk | None]:
        """For tokens ``which`` among all N; None for entropies without a gradient."""
        ...


def chunk_tokens_for(vocabulary: int) -> int:
    """The tokens of a chunk for a vocabulary of this size."""
    return max(16, MAX_CHUNK_LOGITS // vocabulary)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """A model's way from its head's output to logits: ``cap * tanh(scale * x / cap)``.

    Example: Gemma 2 has ``LogitTransform(cap=30.0)``.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """From the head's output to a distribution: softmax(transform(output) / temperature).

    With ``fp32`` the head's product and the sum of its weight's gradient are in float32, whatever
    the dtype of hidden states and weight. The softmax is in float32 always.
    """

    chunk_tokens: int
    temperature: float = 1.0
    transform: LogitTransform = LogitTransform()
    fp32: bool = False

    def logits(self, raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Logits over temperature, float32, in memory of their own."""
        logits = self.transform(raw.float())
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.clone() if logits.data_ptr() == raw.data_ptr() else logits

    def slope(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | float:
        """The derivative of `logits` by the head's output."""
        outer = self.transform.scale / self.temperature
        if self.transform.cap is None:
            return outer
        return (1 - (logits * (self.temperature / self.transform.cap)).square()) * outer


def token_logprobs(
    hidden: FloatNH,
    weight: FloatVH,
    targets: IntN,
    *,
    bias: FloatV | None = None,
    settings: HeadSettings,
    entropy_gradient: bool = False,
    expected_grad: ExpectedGrad | None = None,
) -> tuple[FloatN, FloatN]:
    """The logprob of each target and the entropy of its distribution, float32, in nats.

    Value and gradient equal those of the full logits.

    Args:
        hidden: the hidden state that predicts each target.
        weight: of the language head.
        targets: token ids.
        entropy_gradient: whether entropies carry a gradient.
        expected_grad: the gradients that will arrive, up to a common factor.
    """
    targets = targets.long()
    if not torch.is_grad_enabled():
        expected_grad = None
    output: tuple[Tensor, Tensor] = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, settings, entropy_gradient, expected_grad
    )
    return output


def token_logprobs_by(
    head: Callable[[Float[Tensor, "n H"]], Float[Tensor, "n V"]],
    hidden: FloatNH,
    targets: IntN,
    *,
    settings: HeadSettings,
    entropy_gradient: bool = False,
) -> tuple[FloatN, FloatN]:
    """`token_logprobs` through any ``head``, by recomputation in the backward pass.

    For a head that is more than a weight, for example one with an adapter.
    """

    def compute(hidden: Float[Tensor, "n H"], targets: IntChunk) -> tuple[FloatChunk, FloatChunk]:
        table = torch.log_softmax(settings.logits(head(hidden)), -1)
        entropies = -(table.exp() * table).sum(-1)
        chosen = table.gather(-1, targets.long()[:, None]).squeeze(-1)
        return chosen, entropies if entropy_gradient else entropies.detach()

    # The recomputation draws no random numbers, so there is no generator state to preserve.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    sizes = settings.chunk_tokens
    pairs = zip(torch.split(hidden, sizes), torch.split(targets, sizes), strict=True)
    parts = [checkpoint(compute, *pair, **options) for pair in pairs]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class _HeadLogprobs(torch.autograd.Function):
    """`token_logprobs` with a gradient written by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: FloatNH,
        weight: FloatVH,
        bias: FloatV | None,
        targets: IntN,
        settings: HeadSettings,
        entropy_gradient: bool,
        expected_grad: ExpectedGrad | None,
    ) -> tuple[FloatN, FloatN]:
        found = hidden.new_empty(4, hidden.shape[0], dtype=torch.float32)
        logprobs, entropies, expected = found[0], found[1], found[2:]
        expected.zero_()
        sums = _Gradients(ctx.needs_input_grad, hidden, weight, bias, settings)
        for chunk in logit_chunks(hidden, weight, bias, targets, settings):
            logprobs[chunk.here], entropies[chunk.here] = chunk.logprobs, chunk.entropies
            if expected_grad is None:
                continue
            by_logprob, by_entropy = expected_grad(chunk.here, chunk.logprobs, chunk.entropies)
            expected[0, chunk.here] = by_logprob
            if by_entropy is not None:
                expected[1, chunk.here] = by_entropy
            chunk.differentiate(by_logprob, by_entropy)
            sums.add(chunk)
        ctx.settings, ctx.fused = settings, expected_grad is not None
        ctx.save_for_backward(
            hidden, weight, bias, targets, expected, *(sums.finished() if ctx.fused else ())
        )
        logprobs, entropies = logprobs.clone(), entropies.clone()
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, by_logprob: FloatN | None, by_entropy: FloatN | None) -> Any:
        hidden, weight, bias, targets, expected, *formed = ctx.saved_tensors
        zeros = torch.zeros_like(expected[0])
        arrived = torch.stack([zeros if g is None else g for g in (by_logprob, by_entropy)])
        factor = _common_factor(arrived, expected) if ctx.fused else None
        if factor is not None:
            if factor != 1.0:
                formed = [None if g is None else g.mul_(factor) for g in formed]
            return *formed, None, None, None, None
        settings: HeadSettings = ctx.settings
        sums = _Gradients(ctx.needs_input_grad, hidden, weight, bias, settings)
        for chunk in logit_chunks(hidden, weight, bias, targets, settings):
            entropy_part = None if by_entropy is None else arrived[1, chunk.here]
            chunk.differentiate(arrived[0, chunk.here], entropy_part)
            sums.add(chunk)
        return *sums.finished(), None, None, None, None


def _common_factor(arrived: Float[Tensor, "2 N"], expected: Float[Tensor, "2 N"]) -> float | None:
    """The factor between the two; None when they differ by more, or are not finite."""
    scale = expected.abs().max()
    if not scale:
        return 1.0 if not arrived.any() else None
    unit = (expected / scale).double()
    factor = (unit * arrived).sum() / (unit * expected).sum()
    close = (arrived - factor * expected).abs().max() <= _TOLERANCE * scale * factor.abs()
    return float(factor.float()) if close else None


@dataclass(slots=True, kw_only=True)
class _Chunk:
    """The logits of a run of tokens; ``raw`` is the head's output, later its gradient."""

    here: slice
    hidden: Float[Tensor, "n H"]
    targets: IntChunk
    raw: Float[Tensor, "V n"]
    settings: HeadSettings
    logprobs: FloatChunk
    entropies: FloatChunk
    log_normaliser: FloatChunk

    def differentiate(self, by_logprob: FloatChunk, by_entropy: FloatChunk | None) -> None:
        """Replaces ``raw`` by the loss's gradient with respect to it."""
        tokens = torch.arange(len(self.targets), device=self.raw.device)
        settings = self.settings
        # A target's gradient has two parts; only their sum is rounded.
        at_target = self._softmax_part(self.raw[self.targets, tokens], by_logprob, by_entropy)
        logits = settings.logits(self.raw[self.targets, tokens])
        at_target += by_logprob * settings.slope(logits)
        for rows in _blocks(self.raw):
            self.raw[rows] = self._softmax_part(self.raw[rows], by_logprob, by_entropy)
        self.raw[self.targets, tokens] = at_target.to(self.raw.dtype)

    def _softmax_part(
        self, raw: Float[Tensor, "*rows n"], by_logprob: FloatChunk, by_entropy: FloatChunk | None
    ) -> Float[Tensor, "*rows n"]:
        """-p g for the logprob, -p (log p + entropy) g for the entropy, times the slope."""
        logits = self.settings.logits(raw)
        slope = self.settings.slope(logits)
        table = logits.sub_(self.log_normaliser)
        if by_entropy is None:
            gradient = table.exp_().mul_(-by_logprob)
        else:
            outer = table * by_entropy + (by_logprob + self.entropies * by_entropy)
            gradient = table.exp_().mul_(outer).neg_()
        if isinstance(slope, Tensor) or slope != 1.0:
            gradient *= slope
        return gradient


class _Gradients:
    """The gradients of hidden states, weight and bias, added up over the chunks."""

    def __init__(
        self,
        needed: tuple[bool, ...],
        hidden: FloatNH,
        weight: FloatVH,
        bias: FloatV | None,
        settings: HeadSettings,
    ) -> None:
        self._weight = weight
        self._dtype = torch.float32 if settings.fp32 else weight.dtype
        self._needs_weight = needed[1]
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        self._weight_sum: Tensor | None = None
        self._bias = torch.zeros_like(bias) if bias is not None and needed[2] else None

    def add(self, chunk: _Chunk) -> None:
        """Adds the gradients of a differentiated chunk."""
        raw, hidden = chunk.raw, chunk.hidden.to(self._dtype)
        if self._hidden is not None:
            self._hidden[chunk.here] = self._by_hidden(raw)
        if self._needs_weight and self._weight_sum is None:
            self._weight_sum = raw @ hidden
        elif self._weight_sum is not None:
            self._weight_sum.addmm_(raw, hidden)
        if self._bias is not None:
            self._bias += raw.sum(1)

    def _by_hidden(self, raw: Float[Tensor, "V n"]) -> Float[Tensor, "n H"]:
        if self._dtype == self._weight.dtype:
            return raw.T @ self._weight
        total = raw.new_zeros(raw.shape[1], self._weight.shape[1])
        for rows in _blocks(raw):
            total.addmm_(raw[rows].T, self._weight[rows].to(self._dtype))
        return total

    def finished(self) -> tuple[FloatNH | None, FloatVH | None, FloatV | None]:
        """The gradients of hidden states, weight and bias, each in the dtype of its tensor."""
        weight = self._weight_sum
        return self._hidden, None if weight is None else weight.to(self._weight.dtype), self._bias


def logit_chunks(
    hidden: FloatNH, weight: FloatVH, bias: FloatV | None, targets: IntN, settings: HeadSettings
) -> Iterator[_Chunk]:
    """Chunks in order; each overwrites the logits of the one before."""
    vocabulary, num_tokens = weight.shape[0], hidden.shape[0]
    width = min(settings.chunk_tokens, num_tokens)
    dtype = torch.float32 if settings.fp32 else weight.dtype
    buffer = hidden.new_empty(vocabulary * width, dtype=dtype)
    for start in range(0, num_tokens, width):
        here = slice(start, min(start + width, num_tokens))
        part = hidden[here].to(dtype)
        raw = buffer[: vocabulary * part.shape[0]].view(vocabulary, part.shape[0])
        if dtype == weight.dtype:
            torch.mm(weight, part.T, out=raw)
        else:
            for rows in _blocks(raw):
                torch.mm(weight[rows].to(dtype), part.T, out=raw[rows])
        if bias is not None:
            raw += bias[:, None]
        yield _summarised(here, part, targets[here], raw, settings)


def _summarised(
    here: slice,
    hidden: Float[Tensor, "n H"],
    targets: IntChunk,
    raw: Float[Tensor, "V n"],
    settings: HeadSettings,
) -> _Chunk:
    """One pass over the logits: their maximum, and sums of exp(z) and z exp(z) relative to it."""
    peak = total = moment = raw.new_zeros(raw.shape[1], dtype=torch.float32)
    for rows in _blocks(raw):
        logits = settings.logits(raw[rows])
        highest = logits.amax(0)
        if rows.start:
            highest = torch.maximum(peak, highest)
            lowered = peak - highest
            shrunk = lowered.exp()
            moment, total = (moment + lowered * total) * shrunk, total * shrunk
        peak = highest
        weights = logits.sub_(peak).exp()
        total = total + weights.sum(0)
        moment = moment + weights.mul_(logits).sum(0)
    log_total = total.log()
    log_normaliser = peak + log_total
    chosen = settings.logits(raw[targets, torch.arange(len(targets), device=raw.device)])
    return _Chunk(
        here=here,
        hidden=hidden,
        targets=targets,
        raw=raw,
        settings=settings,
        logprobs=chosen - log_normaliser,
        # Where one token has all the mass, rounding may make the entropy negative.
        entropies=(log_total - moment / total).clamp_(min=0),
        log_normaliser=log_normaliser,
    )


def _blocks(raw: Float[Tensor, "V n"]) -> Iterator[slice]:
    """Runs of the vocabulary's rows."""
    rows = max(1, _BLOCK_LOGITS.get(raw.device.type, _LARGE_BLOCK_LOGITS) // raw.shape[1])
    for start in range(0, raw.shape[0], rows):
        yield slice(start, min(start + rows, raw.shape[0]))
