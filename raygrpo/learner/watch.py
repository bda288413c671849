"""Proof that training happens: every trainable tensor gets a gradient and moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from raygrpo.errors import NumericError
from raygrpo.weights.buckets import checksum, tensor_bytes

# Updates with a gradient by which all must have moved. The second matrix of a LoRA adapter starts
# at zero, so the first one's gradient is zero in the first update; rare experts need a few.
PATIENCE = 8


class MovementWatch:
    """Looks at the first updates of a process, until every trainable tensor has moved.

    Costs one checksum of the fp32 weights at the start and one after each watched update, normally
    the first alone. All ranks must construct it and call it together.

    Args:
        parameters: the trainable parameters by name.
        masters: the fp32 weights by the same names, gathered where they are sharded.
        sum_over_ranks: adds a number up over the ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masters: Callable[[], Iterable[tuple[str, Tensor]]],
        sum_over_ranks: Callable[[float], float],
    ) -> None:
        self._masters = masters
        self._sum = sum_over_ranks
        self._updates = 0
        self._here: set[str] = set()
        self._unreached = list(parameters)
        self._still = _checksums(masters())
        self._hooks = [
            parameter.register_hook(partial(self._see, name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
        ]

    def after_update(self, grad_norm: float) -> None:
        """Takes note of an applied update; one without any gradient teaches nothing and is not
        counted.

        Raises:
            NumericError: on every rank, naming tensors that `PATIENCE` updates did not reach.
        """
        if not self._hooks or grad_norm == 0:
            return
        self._updates += 1
        self._unreached = [n for n in self._unreached if not self._sum(float(n in self._here))]
        now = _checksums(self._masters())
        self._still = {name: old for name, old in self._still.items() if now[name] == old}
        if not self._unreached and not self._still:
            self._end()
        elif self._updates >= PATIENCE:
            self._end()
            raise NumericError(
                f"after {self._updates} optimizer updates {self._text()}",
                "these weights take no part in the model's output, or something has frozen them; "
                "train another model, or raise optimizer.lr if it is almost 0",
            )

    def _text(self) -> str:
        parts = [
            f"{len(names)} tensors {what}, the first being {names[0]}"
            for what, names in (
                ("have had no gradient", self._unreached),
                ("have not moved", sorted(self._still)),
            )
            if names
        ]
        return " and ".join(parts)

    def _see(self, name: str, gradient: Tensor) -> None:
        if name not in self._here and bool(gradient.ne(0).any()):
            self._here.add(name)

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@torch.no_grad()
def _checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    return {name: checksum(tensor_bytes(tensor)) for name, tensor in tensors}
