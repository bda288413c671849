"""The network in training: from a microbatch to the logprob of each trained token.

`PolicyModel` runs the Hugging Face network over the rows of a microbatch; `LogprobHead` turns the
hidden states of the trained tokens into logprobs and entropies, chunk by chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from raygrpo.algorithm.logprobs import (
    ExpectedGrad,
    HeadSettings,
    chunk_tokens_for,
    token_logprobs,
    token_logprobs_by,
)
from raygrpo.algorithm.packing import RowLayout, unpacked
from raygrpo.errors import ConfigError
from raygrpo.learner.attention.segments import window_marks
from raygrpo.learner.inputs import PolicyInputs, TreeLayout
from raygrpo.models import attention_masks, logit_transform

if TYPE_CHECKING:
    from jaxtyping import Float

    from raygrpo.algorithm.shapes import FloatBT, FloatN, FloatNH, IntBT, IntN


class RowShard(Protocol):
    """This rank's part of rows whose tokens several ranks share.

    Attributes:
        attention: the name of the attention function that sees whole rows.
    """

    attention: str

    def forward(self, policy: PolicyModel, inputs: PolicyInputs) -> tuple[FloatN, FloatN]:
        """Logprobs and entropies of all trained tokens, with gradient, on every rank."""
        ...


class LogprobHead(nn.Module):
    """The language-model head, from hidden states to logprobs, in chunks.

    The number of chunks differs between ranks, so ZeRO-3 must gather the weight once for all of
    them: at this module. `forward` calls the inner head's ``forward``, which bypasses its hooks.
    """

    def __init__(
        self, model: Any, temperature: float, *, fp32: bool, entropy_gradient: bool
    ) -> None:
        super().__init__()
        self._entropy_gradient = entropy_gradient
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
        self, hidden: FloatNH, targets: IntN, expected_grad: ExpectedGrad | None = None
    ) -> tuple[FloatN, FloatN]:
        """Logprobs of ``targets`` and the entropies of their distributions."""
        common: dict[str, Any] = {
            "settings": self.settings,
            "entropy_gradient": self._entropy_gradient,
        }
        if type(self.head) is not nn.Linear:
            return token_logprobs_by(self.head.forward, hidden, targets, **common)
        return token_logprobs(
            hidden,
            self.head.weight,
            targets,
            bias=self.head.bias,
            expected_grad=expected_grad,
            **common,
        )

    def logits(self, hidden: Float[Tensor, "*shape H"]) -> Float[Tensor, "*shape V"]:
        """All logits at temperature 1, for the comparison of row layouts (`find_layout`)."""
        logits: Tensor = self.settings.transform(self.head(hidden).float())
        return logits


class PolicyModel(nn.Module):
    """A Hugging Face causal language model whose forward gives logprobs of trained tokens.

    The temperature belongs to the policy: logprobs are of softmax(logits / temperature). Dropout
    is off, whatever the model's configuration says: the ratio of two policies must not be noise.

    Attributes:
        model: the Hugging Face model; its parameters are the policy's.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        layout: RowLayout = "shared",
        fp32_head: bool = False,
        entropy_gradient: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.logprob_head = LogprobHead(
            model, temperature, fp32=fp32_head, entropy_gradient=entropy_gradient
        )
        self._layout: RowLayout = layout
        self._shard: RowShard | None = None
        _disable_dropout(model)
        # Transformers recomputes activations in training mode only; nothing else depends on it.
        self.train(gradient_checkpointing)
        if gradient_checkpointing:
            # Releases of transformers have one name or the other; the old one warns in new ones.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})

    @property
    def layout(self) -> RowLayout:
        """The rows that compute the same as samples in rows of their own (see `RowLayout`)."""
        return self._layout

    def share_rows(self, shard: RowShard) -> None:
        """Makes ``shard`` compute each row together with other ranks, from now on."""
        self._shard, self._layout = shard, unpacked(self._layout)
        self.model.set_attn_implementation(shard.attention)

    def forward(self, inputs: PolicyInputs) -> tuple[FloatBT, FloatBT]:
        """Logprobs and entropies, fp32, in nats; zeros where nothing is trained."""
        if self._shard is not None:
            logprobs, entropies = self._shard.forward(self, inputs)
        else:
            hidden_BTH = self.hidden(inputs.token_ids, inputs.tree)
            targets = inputs.token_ids[inputs.rows, inputs.columns]
            logprobs, entropies = self.logprob_head(
                hidden_BTH[inputs.rows, inputs.predictors], targets, inputs.expected_grad
            )
        return self._scatter(inputs, logprobs), self._scatter(inputs, entropies)

    def hidden(self, token_ids: IntBT, tree: TreeLayout | None) -> Float[Tensor, "B T H"]:
        """The last hidden states."""
        options: dict[str, Any] = {}
        if tree is not None:
            options["position_ids"] = tree.positions
            config = self.model.config
            if self.layout == "packed":
                like = torch.empty(0, dtype=self.model.dtype, device=token_ids.device)
                options["attention_mask"] = window_marks(config, like)
                options["segments"] = tree.plan
            else:
                options["attention_mask"] = attention_masks(
                    config, tree.allowed(), tree.positions, tree.positions, self.model.dtype
                )
        output = self.model.base_model(input_ids=token_ids, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @staticmethod
    def _scatter(inputs: PolicyInputs, values: FloatN) -> FloatBT:
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
