"""A reference policy that follows the trained one (TR-DPO, arXiv 2404.09656)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class MovingReference:
    """An exponential moving average of the policy, held by ``model``.

    It is averaged in float32 (4 bytes a parameter more where the model is in bfloat16): a weight
    moves by less than bfloat16's rounding in most steps, and would stay where it is for ever.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = dict(model.named_parameters())
        # In float32 these are the model's own tensors.
        self._averages = {name: held.data.float() for name, held in self._held.items()}

    @torch.no_grad()
    def move(self, policy: Iterable[tuple[str, Tensor]], alpha: float) -> None:
        """average <- alpha * policy + (1 - alpha) * average; it passes over names it lacks."""
        for name, weight in policy:
            if name in self._held:
                average = self._averages[name].lerp_(weight.to(self._averages[name]), alpha)
                self._held[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        """The averages, for a checkpoint."""
        return {name: average.cpu() for name, average in self._averages.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        for name, held in self._held.items():
            held.copy_(self._averages[name].copy_(state[name]))
