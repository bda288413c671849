"""Token logprobs from hidden states without ever holding the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits that a chunk may hold; one fp32 copy of them is four times as many bytes.
MAX_CHUNK_LOGITS = 2**25


def chunk_tokens_for(vocabulary: int) -> int:
    """Tokens of a chunk for a vocabulary, so that a chunk's fp32 logits take about 128 MiB."""
    return max(16, MAX_CHUNK_LOGITS // vocabulary)


def _identity(logits: Tensor) -> Tensor:
    return logits


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    transform: Callable[[Tensor], Tensor] = _identity,
    chunk_tokens: int,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logprob of each target under softmax(transform(head(hidden)) / temperature), and the entropy.

    Logits are computed ``chunk_tokens`` tokens at a time and, with several chunks, recomputed in
    the backward pass, so memory is that of one chunk. Value and gradient equal those of the full
    logits. The softmax is in fp32 whatever the head's dtype.

    Args:
        hidden: [N, H], the hidden state that predicts each target.
        head: [n, H] -> [n, V].
        targets: [N] token ids.
        transform: elementwise, from the head's output (as fp32) to logits: soft-capping, scale.
        entropy_gradient: whether entropies carry a gradient.

    Returns:
        Logprobs [N] in nats, fp32, with gradient, and entropies [N] in nats, fp32.
    """
    compute = partial(
        _chunk,
        head=head,
        transform=transform,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
    )
    if hidden.shape[0] <= chunk_tokens:
        logprobs, entropies = compute(hidden, targets)
        return logprobs, entropies
    # The recomputation draws no random numbers, so there is no generator state to preserve.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    parts = [
        checkpoint(compute, hidden_chunk, target_chunk, **options)
        for hidden_chunk, target_chunk in zip(
            torch.split(hidden, chunk_tokens), torch.split(targets, chunk_tokens), strict=True
        )
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    *,
    head: Callable[[Tensor], Tensor],
    transform: Callable[[Tensor], Tensor],
    temperature: float,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    logits = transform(head(hidden).float())
    if temperature != 1.0:
        logits = logits / temperature
    log_normaliser = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets.long()[:, None]).squeeze(-1)
    if entropy_gradient:
        table = logits - log_normaliser[:, None]
        return chosen - log_normaliser, -(table.exp() * table).sum(-1)
    # Last, because the recomputation stops at the last tensor that the backward pass needs.
    with torch.no_grad():
        entropies = torch.special.entr((logits - log_normaliser[:, None]).exp_()).sum(-1)
    return chosen - log_normaliser, entropies
