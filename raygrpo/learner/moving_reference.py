"""A reference policy that follows the trained one (TR-DPO, arXiv 2404.09656)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


class MovingReference:
    """Keeps ``model`` at an exponential moving average of the policy.

    The average is in float32, 4 more bytes per parameter of a bfloat16 model. It mostly moves by
    less than bfloat16's rounding: an average in bfloat16 would never move.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = dict(model.named_parameters())
        # In float32 these are the model's own tensors.
        self._averages = {name: held.data.float() for name, held in self._held.items()}

    @torch.no_grad()
    def move(self, policy: Iterable[tuple[str, Shaped[Tensor, "..."]]], alpha: float) -> None:
        """average <- alpha * policy + (1 - alpha) * average; other names are ignored."""
        for name, weight in policy:
            if name in self._held:
                average = self._averages[name].lerp_(weight.to(self._averages[name]), alpha)
                self._held[name].copy_(average)

    def state(self) -> dict[str, Float[Tensor, "..."]]:
        """The averages, for a checkpoint."""
        return {name: average.cpu() for name, average in self._averages.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Restores the averages that `state` returned."""
        for name, held in self._held.items():
            held.copy_(self._averages[name].copy_(state[name]))
