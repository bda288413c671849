"""FLOPs of a model's matrix products, and what a plain product reaches on the same device."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# A GPU reaches its peak at larger sizes than a few threads of a CPU, where they would take long.
MATMUL_SIZES = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens through the layers, pairs of tokens in attention, and tokens through the head."""

    tokens: int
    pairs: int
    head_tokens: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.head_tokens + other.head_tokens,
        )


def matmul_flops(dtype: str, device: str, threads: int, size: int | None = None) -> float:
    """FLOP/s of a square matrix product: the best of seven, after one that warms up."""
    import torch

    torch.set_num_threads(threads)
    size = size or MATMUL_SIZES[device]
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        product = a @ b
        float(product[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def separate_rows(groups: Iterable[tuple[int, Iterable[int]]]) -> Work:
    """The work on groups of (prompt length, completion lengths) in unpadded rows of one each."""
    total = Work(0, 0, 0)
    for prompt, completions in groups:
        for completion in completions:
            length = prompt + completion
            total += Work(length, length * (length + 1) // 2, completion)
    return total


def executed(microbatch: Any, layout: str) -> Work:
    """What the learner computes of a microbatch: its whole grid, and attention's whole rectangles.

    Padding counts, and so does what a mask hides; a causal kernel skips the upper half. ``layout``
    is the learner's, see `raygrpo.algorithm.packing`.
    """
    import torch

    from raygrpo.learner.inputs import policy_inputs

    rows, width = microbatch.token_ids.shape
    tree = policy_inputs(microbatch, torch.device("cpu")).tree
    if tree is None:
        pairs = rows * width * (width + 1) // 2
    elif layout == "packed":
        pairs = sum(query_and_pairs(batch)[1] for batch in tree.plan.batches)
    else:
        pairs = rows * width * width
    return Work(rows * width, pairs, max(1, int(microbatch.loss_mask.sum())))


def query_and_pairs(batch: Any) -> tuple[int, int]:
    """Query slots of a `segments.Batch` of attention, and the pairs that its kernel computes."""
    slots = batch.num * batch.length
    if batch.prefix is None:
        return slots, slots * (batch.length + 1) // 2
    return slots, slots * batch.prefix.positions.shape[1]


def forward_flops(model: str, work: Work) -> float:
    """FLOPs of the matrix products of a forward pass of the model in a directory.

    A backward pass takes twice as many.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    projections = 2 * heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (size * projections + 3 * config.intermediate_size)
    # Scores and values: two products of each pair.
    attention = 2 * layers * heads * size * work.pairs
    head = config.hidden_size * config.vocab_size * work.head_tokens
    return 2.0 * (layers * layer * work.tokens + attention + head)


def update_flops(model: str, work: Work) -> float:
    """FLOPs of a forward and a backward pass."""
    return 3 * forward_flops(model, work)
