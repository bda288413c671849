"""The oracle of learners: one process, plain torch, fp32."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from raygrpo.algorithm.packing import RowLayout
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from raygrpo.learner.base import Learner
from raygrpo.learner.inputs import PolicyInputs
from raygrpo.learner.loading import load_policy
from raygrpo.learner.lora import add_adapter
from raygrpo.learner.policy import PolicyModel
from raygrpo.learner.shards import Layout
from tests.close import as_vector


class ReferenceLearner(Learner):
    """AdamW from torch on the whole model, on ``device``; rows in ``layout``, or as found."""

    def __init__(
        self, config: RunConfig, *, device: str = "cpu", layout: RowLayout | None = None
    ) -> None:
        assert config.model.dtype == "float32"
        policy = load_policy(
            config.model,
            seed=config.seed,
            dtype=torch.float32,
            temperature=config.sampling.temperature,
            entropy_gradient=config.loss.has_entropy_bonus,
            gradient_checkpointing=config.learner.gradient_checkpointing,
        )
        if layout is not None:
            policy = PolicyModel(
                policy.model,
                temperature=config.sampling.temperature,
                layout=layout,
                entropy_gradient=config.loss.has_entropy_bonus,
                gradient_checkpointing=config.learner.gradient_checkpointing,
            )
        self.policy = policy.to(device)
        frozen = None
        if config.learner.lora:
            add_adapter(policy.model, config)
        elif config.loss.beta:
            frozen = copy.deepcopy(policy).requires_grad_(False)
        super().__init__(
            config,
            policy=policy,
            reference=frozen,
            device=torch.device(device),
            rank=0,
            layout=Layout(num_ranks=1, zero_stage=0, dtype="float32"),
        )
        self.reference = frozen
        section = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.parameters() if parameter.requires_grad],
            lr=section.lr,
            **section.adamw.model_dump(),
        )

    def _copies(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]]
    ) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach().cpu().clone()) for name, parameter in parameters)

    def close(self) -> None:
        self.optimizer.zero_grad()

    def _forward(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = self.policy(inputs)
        return output

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _apply(self, lr: float) -> float:
        max_norm = self.config.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), max_norm)
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def _master_weights(self) -> Iterator[tuple[str, Tensor]]:
        named = self.policy.model.named_parameters()
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    def _sum_over_ranks(self, value: float) -> float:
        return value

    def _state(self) -> dict[str, Any]:
        return {"model": self.policy.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _check_state(self, state: dict[str, Any]) -> None:
        ours = {name: tensor.shape for name, tensor in self.policy.model.state_dict().items()}
        if ours != {name: tensor.shape for name, tensor in state["model"].items()}:
            raise ConfigError("the checkpoint is of another model", "set model.path to that model")

    def _load_state(self, state: dict[str, Any]) -> None:
        self.policy.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def weights_vector(learner: Learner) -> Tensor:
    """All weights of a learner as one vector."""
    return as_vector(weight for _, weight in learner.named_weights())
