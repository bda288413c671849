"""Attention on a CPU by torch's kernels, with the backward pass in float32 at least.

The backward kernel rounds more in bfloat16, and is slower there than in float32 for segments of a
few hundred tokens. The kernels know heads that share keys: keys and values are not repeated, and
their gradients need no addition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def attend(
    query: Float[Tensor, "n heads Q D"],
    key: Float[Tensor, "n key_heads K D"],
    value: Float[Tensor, "n key_heads K D"],
    mask: Float[Tensor, "#n 1 Q K"] | None,
    scaling: float | None,
) -> Float[Tensor, "n heads Q D"]:
    """Attention under an additive mask; without a mask causal, with as many keys as queries."""
    output: Tensor = _Attention.apply(query, key, value, mask, scaling)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "n heads Q D"],
        key: Float[Tensor, "n key_heads K D"],
        value: Float[Tensor, "n key_heads K D"],
        mask: Float[Tensor, "#n 1 Q K"] | None,
        scaling: float | None,
    ) -> Float[Tensor, "n heads Q D"]:
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=mask is None, attn_mask=mask, scale=scaling
        )
        ctx.save_for_backward(query, key, value, output, log_sums, mask)
        ctx.scaling = scaling
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "n heads Q D"]) -> Any:
        query, key, value, output, log_sums, mask = ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.to(dtype) for t in (gradient, query, key, value, output)),
            log_sums,
            0.0,
            mask is None,
            attn_mask=None if mask is None else mask.to(dtype),
            scale=ctx.scaling,
        )
        of_query, of_key, of_value = (grad.to(query.dtype) for grad in grads)
        return of_query, of_key, of_value, None, None
