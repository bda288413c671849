"""Linear layers that also keep their weights in the blocked layout of CPU matrix kernels.

torch reorders a plain weight at each product. Decoding multiplies few rows by the same weights many
times, so a reordered copy pays. The copy costs the memory of the linear weights once more, and is
made again after each change of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by a reordered copy of its parameters."""

    packed: Tensor | None

    @classmethod
    def over(cls, linear: nn.Linear) -> PackedLinear:
        """Shares the parameters of ``linear``; ``packed`` is None until it is set."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight, made.bias, made.packed = linear.weight, linear.bias, None
        return made

    @staticmethod
    def pack(weight: Tensor, num_rows: int) -> Tensor:
        """A reordered copy of a weight, for products with about ``num_rows`` rows."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)
        return packed

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``, by the plain weight until there is a packed one."""
        packed = self.packed  # another thread may set it
        weight = self.weight if packed is None else packed
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, weight, self.bias, "none", [], ""
        )
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies packed weights of this dtype."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    supported: bool = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def use_packed_linears(model: Any) -> list[PackedLinear]:
    """Replaces each plain linear layer by a `PackedLinear`; parameters keep their names.

    Returns the new layers. The caller sets ``packed`` of each, again after each change of weights.
    """
    packed = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == model.dtype:
                packed.append(PackedLinear.over(child))
                setattr(module, name, packed[-1])
    return packed
