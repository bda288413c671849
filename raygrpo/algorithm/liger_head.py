"""Liger's fused language head on a GPU: its logits never reach the GPU's memory.

Liger's scaled cross entropy gives what `token_logprobs` promises: per token the negative logprob
and the entropy, both with whatever gradient arrives, at a temperature. The logits are formed again
in the backward pass. Its kernel is for Hopper GPUs, bfloat16 and heads without bias or cap;
elsewhere Liger computes in plain torch, which our own chunks do in fewer passes. Entropies come
rounded to bfloat16.

No GPU has run it with raygrpo yet, so its first use on a device is a comparison with the
definition; what fails there, or differs, is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HOPPER = (9, 0)
# The kernel's tile; other widths would have it pad a copy of the weight in each call.
_WIDTH_TILE = 64
# Norms of differences: rounding to bfloat16 gives 0.003, a wrong sign or a lost part above 0.1.
_TOLERANCE = 0.03

# From hidden states [N, H], weight [V, H], targets [N] and temperature to logprobs and entropies.
Head = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def serves(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, cap: float | None, fp32: bool
) -> bool:
    """Whether Liger's kernel is installed, is made for this head and this device, and agrees."""
    return (
        hidden.device.type == "cuda"
        and hidden.dtype == weight.dtype == torch.bfloat16
        and weight.shape[1] % _WIDTH_TILE == 0
        and bias is None
        and cap is None
        and not fp32
        and _serves_device(hidden.device)
    )


def fused_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies [N], float32, of softmax(hidden @ weight.T / temperature)."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    no_target, tiles, with_entropy = -100, 1, True
    losses, entropies = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, targets, temperature, no_target, tiles, with_entropy
    )
    return -losses, entropies.float()


@cache
def _serves_device(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) != HOPPER:
        return False
    if find_spec("liger_kernel") is None or find_spec("cutlass") is None:
        return False
    reason = disagreement(fused_logprobs, device, torch.bfloat16)
    if reason is None:
        log.info("language head: Liger's fused kernel")
    else:
        log.warning("language head: raygrpo's own, since Liger's fused kernel %s", reason)
    return reason is None


def disagreement(head: Head, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a head in value or gradient, on random inputs; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((150, 128), (520, 128), (150,), (150,))
    hidden, weight, by_logprob, by_entropy = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    # Logits of deviation 2.
    weight = weight * (2 / shapes[1][1] ** 0.5)
    targets = torch.randint(shapes[1][0], (150,), generator=generator).to(device)
    results = []
    for compute in (head, _by_definition):
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        try:
            with torch.enable_grad():
                logprobs, entropies = compute(*leaves, targets, 0.7)
                total = (logprobs * by_logprob + entropies * by_entropy).sum()
            gradients = torch.autograd.grad(total, leaves)
        # Whatever a compiler of kernels raises.
        except Exception as error:
            return f"fails: {type(error).__name__}: {str(error)[:500]}"
        results.append([t.detach().float() for t in (logprobs, entropies, *gradients)])
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    if all(gap < _TOLERANCE for gap in gaps):
        return None
    return f"differs from the definition by {gaps} of the norm"


def _by_definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    table = torch.log_softmax(hidden.float() @ weight.float().T / temperature, -1)
    return table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
