"""The network in training: from a microbatch to the logprob of each trained token."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raygrpo.algorithm.logprobs import (
    HeadSettings,
    TokenGradient,
    chunk_tokens_for,
    token_logprobs,
    token_logprobs_by,
)
from raygrpo.algorithm.packing import RowLayout
from raygrpo.errors import ConfigError
from raygrpo.learner.attention.segments import window_marks
from raygrpo.learner.inputs import PolicyInputs, TreeLayout
from raygrpo.models import attention_masks, logit_transform


class RowShard(Protocol):
    """This rank's part of rows whose tokens several ranks share."""

    def forward(self, policy: PolicyModel, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [N] of all trained tokens, with gradient, on every rank."""
        ...


class LogprobHead(nn.Module):
    """The language-model head, from hidden states to logprobs, in chunks.

    One module, so that ZeRO-3 gathers the head's weight once for all chunks, whose number differs
    between ranks: `forward` calls the head's own ``forward``, which passes by its hooks.
    """

    def __init__(self, model: Any, temperature: float, *, fp32: bool = False) -> None:
        super().__init__()
        # The learner sets it where the loss has an entropy bonus.
        self.entropy_gradient = False
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise ConfigError(f"models of type {model.config.model_type!r} have no language head")
        if fp32 and type(self.head) is not nn.Linear:
            kind = type(self.head).__name__
            raise ConfigError(f"model.fp32_head: the language head is a {kind}, not nn.Linear")
        self.settings = HeadSettings(
            chunk_tokens=chunk_tokens_for(model.config.get_text_config().vocab_size),
            temperature=temperature,
            transform=logit_transform(model.config),
            fp32=fp32,
        )

    def forward(
        self, hidden: Tensor, targets: Tensor, token_gradient: TokenGradient | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [N] and entropies [N] of ``targets`` [N], given ``hidden`` [N, H]."""
        common: dict[str, Any] = {
            "settings": self.settings,
            "entropy_gradient": self.entropy_gradient,
        }
        if type(self.head) is not nn.Linear:
            return token_logprobs_by(self.head.forward, hidden, targets, **common)
        return token_logprobs(
            hidden,
            self.head.weight,
            targets,
            bias=self.head.bias,
            token_gradient=token_gradient,
            **common,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits at temperature 1; for probes."""
        logits: Tensor = self.settings.transform(self.head(hidden).float())
        return logits


class PolicyModel(nn.Module):
    """A Hugging Face causal language model whose forward gives logprobs of trained tokens.

    The temperature belongs to the policy: logprobs are of softmax(logits / temperature). Dropout
    is off, whatever the model's configuration says: the ratio of two policies must not be noise.

    Attributes:
        model: the Hugging Face model; its parameters are the policy's.
        layout: rows that compute the same as samples in rows of their own. ``plain``: one sample
            a row; ``shared``: completions of a group that share their prompt, under a mask over
            the row; ``packed``: any number of both, with attention by segment.
        shard: this rank's part of the rows, where ranks share their tokens.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        layout: RowLayout = "shared",
        fp32_head: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.logprob_head = LogprobHead(model, temperature, fp32=fp32_head)
        self._layout: RowLayout = layout
        self.shard: RowShard | None = None
        _disable_dropout(model)
        # Transformers recomputes activations in training mode only; nothing else depends on it.
        self.train(gradient_checkpointing)
        if gradient_checkpointing:
            # The name since transformers 5.2x; the older one warns there.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})

    @property
    def layout(self) -> RowLayout:
        """See the class; ranks that share a row's tokens attend under a mask over it."""
        return "shared" if self._layout == "packed" and self.shard is not None else self._layout

    def forward(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, T], fp32, in nats; zeros where nothing is trained."""
        if self.shard is not None:
            logprobs, entropies = self.shard.forward(self, inputs)
        else:
            hidden_BTH = self.hidden(inputs.token_ids, inputs.tree)
            targets = inputs.token_ids[inputs.rows, inputs.columns]
            logprobs, entropies = self.logprob_head(
                hidden_BTH[inputs.rows, inputs.predictors], targets, inputs.token_gradient
            )
        return self._scatter(inputs, logprobs), self._scatter(inputs, entropies)

    def hidden(self, token_ids: Tensor, tree: TreeLayout | None) -> Tensor:
        """Last hidden states [B, T, H]."""
        options: dict[str, Any] = {}
        if tree is not None:
            options["position_ids"] = tree.positions
            config = self.model.config
            if self.layout == "packed":
                like = torch.empty(0, dtype=self.dtype, device=token_ids.device)
                options["attention_mask"] = window_marks(config, like)
                options["segments"] = tree.plan
            else:
                options["attention_mask"] = attention_masks(
                    config, tree.allowed(), tree.positions, tree.positions, self.dtype
                )
        output = self.model.base_model(input_ids=token_ids, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @staticmethod
    def _scatter(inputs: PolicyInputs, values: Tensor) -> Tensor:
        shape = inputs.token_ids.shape
        grid = torch.zeros(shape, dtype=values.dtype, device=values.device)
        return grid.index_put((inputs.rows, inputs.columns), values) * inputs.loss_mask


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
