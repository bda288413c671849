"""Tensors by their shapes, for signatures; only type checkers import this module.

B rows, T tokens of a row, N tokens of all rows, S sequences, V vocabulary, H hidden size;
N x G are groups and their completions.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

BoolBT = Bool[Tensor, "B T"]
FloatBT = Float[Tensor, "B T"]
IntBT = Int[Tensor, "B T"]
FloatN = Float[Tensor, "N"]
IntN = Int[Tensor, "N"]
FloatNH = Float[Tensor, "N H"]
# Some of the N tokens.
FloatChunk = Float[Tensor, "n"]
IntChunk = Int[Tensor, "n"]
FloatV = Float[Tensor, "V"]
FloatVH = Float[Tensor, "V H"]
FloatS = Float[Tensor, "S"]
BoolNG = Bool[Tensor, "N G"]
FloatNG = Float[Tensor, "N G"]
Scalar = Float[Tensor, ""]
