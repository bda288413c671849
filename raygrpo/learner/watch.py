"""Proof that training happens: every trainable tensor gets a gradient and moves.

`MovementWatch` looks at the first updates of a process and raises when a tensor is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raygrpo.errors import ConfigError, NumericError
from raygrpo.weights.buckets import checksum, tensor_bytes

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

# All tensors must have moved after so many updates. The second matrix of a LoRA adapter starts at
# zero, so the first matrix has no gradient in the first update; rare experts need several updates.
PATIENCE = 8


def check_trainable(model: nn.Module) -> None:
    """Refuses a model with a frozen parameter, where the whole model is to be trained.

    Raises:
        ConfigError: naming the parameter.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        raise ConfigError(
            f"the model's code freezes {len(frozen)} of its tensors, the first being {frozen[0]}",
            "train another model, or an adapter (learner.lora), which leaves all of them alone",
        )


@dataclass(slots=True)
class _Still:
    """A tensor that has not moved yet.

    Attributes:
        checksum: of its first values.
        min_lr: the learning rate from which AdamW moves any of its values by more than rounding;
            AdamW's steps are about as large as the rate.
        tried: updates so far that could have moved it.
    """

    checksum: int
    min_lr: float
    tried: int = 0


class MovementWatch:
    """Looks at the first updates of a process, until every trainable tensor has moved.

    The cost is one checksum of the fp32 weights at the start and one after each watched update,
    normally the first alone. An update counts for a tensor only if its learning rate can move the
    tensor. All ranks must construct the watch and call it together.

    Args:
        parameters: the trainable parameters by name.
        masters: the fp32 weights by the same names, gathered where they are sharded.
        sum_over_ranks: adds a number up over the ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masters: Callable[[], Iterable[tuple[str, Float32[Tensor, "..."]]]],
        sum_over_ranks: Callable[[float], float],
    ) -> None:
        self._masters = masters
        self._sum = sum_over_ranks
        self._updates = 0
        self._here: set[str] = set()
        self._unreached = list(parameters)
        self._still = {
            name: _Still(checksum=_checksum(tensor), min_lr=_smallest_rate(tensor))
            for name, tensor in masters()
        }
        self._hooks = [
            parameter.register_hook(partial(self._see, name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
        ]

    def after_update(self, grad_norm: float, lr: float) -> None:
        """Takes note of an applied update; an update whose gradient is 0 does not count.

        Raises:
            NumericError: on every rank, naming tensors that `PATIENCE` updates left out.
        """
        if not self._hooks or grad_norm == 0:
            return
        self._updates += 1
        self._unreached = [n for n in self._unreached if not self._sum(float(n in self._here))]
        self._look(lr)
        unreached = self._unreached if self._updates >= PATIENCE else []
        still = sorted(name for name, item in self._still.items() if item.tried >= PATIENCE)
        if unreached or still:
            self._end()
            raise NumericError(
                f"after {self._updates} optimizer updates {_text(unreached, still)}",
                "these weights take no part in the model's output, or something has frozen them; "
                "train another model",
            )
        if not self._unreached and not self._still:
            self._end()

    def _look(self, lr: float) -> None:
        """Forgets the tensors that have moved; skips the look where the rate can move none."""
        could = [item for item in self._still.values() if lr > item.min_lr]
        for item in could:
            item.tried += 1
        if could or self._updates <= PATIENCE:
            for name, tensor in self._masters():
                if name in self._still and self._still[name].checksum != _checksum(tensor):
                    del self._still[name]

    def _see(self, name: str, gradient: Float[Tensor, "..."]) -> None:
        if name not in self._here and bool(gradient.ne(0).any()):
            self._here.add(name)

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _text(unreached: list[str], still: list[str]) -> str:
    parts = [
        f"{len(names)} tensors {what}, the first being {names[0]}"
        for what, names in (("have had no gradient", unreached), ("have not moved", still))
        if names
    ]
    return " and ".join(parts)


@torch.no_grad()
def _checksum(tensor: Float32[Tensor, "..."]) -> int:
    return checksum(tensor_bytes(tensor))


@torch.no_grad()
def _smallest_rate(tensor: Float32[Tensor, "..."]) -> float:
    return torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
