"""Attention on a CPU by torch's kernels, with a backward pass in float32 where they have less.

In bfloat16 the backward kernel rounds more, and on a CPU with AMX takes two to three times as long
as in float32 for segments of a few hundred tokens; as long at 500, and a third less at 2,000, which
is not worth another path. The kernels know heads that share keys, so that keys, values and their
gradients are neither repeated nor added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend(
    query: Tensor,  # [n, heads, Q, D]
    key: Tensor,  # [n, key heads, K, D]
    value: Tensor,  # [n, key heads, K, D]
    mask: Tensor | None,  # additive, [n or 1, 1, Q, K]
    scaling: float | None,
) -> Tensor:
    """Attention [n, heads, Q, D]; without a mask it is causal, with as many keys as queries."""
    output: Tensor = _Attention.apply(query, key, value, mask, scaling)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
    ) -> Tensor:
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=mask is None, attn_mask=mask, scale=scaling
        )
        ctx.save_for_backward(query, key, value, output, log_sums, mask)
        ctx.scaling = scaling
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
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
