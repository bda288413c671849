"""The network in training: from a microbatch to the logprob of each trained token."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from raygrpo.config import ModelSection
from raygrpo.errors import ConfigError
from raygrpo.learner.attention.segments import SegmentPlan, make_plan, use_segments, window_marks
from raygrpo.learner.attention.ulysses import SequenceShard
from raygrpo.models import attention_masks, load_model, logit_transform
from raygrpo.types import IntArray, Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """What `PolicyModel` reads of a microbatch, on its device.

    ``token_ids`` and ``loss_mask`` are [B, T]. ``rows``, ``columns`` and ``predictors`` [N] name
    the N trained tokens and the column whose hidden state predicts each; without any, they name one
    untrained token, so that every microbatch passes through all of the network (under ZeRO-3 ranks
    must take the same path). ``tree`` is None where plain causal attention is exact.
    ``token_gradient`` foretells what the loss gives each of the N tokens as gradient.
    """

    token_ids: Tensor
    loss_mask: Tensor
    rows: Tensor
    columns: Tensor
    predictors: Tensor
    tree: TreeLayout | None
    token_gradient: TokenGradient | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeLayout:
    """Positions, segments and their parents [B, T] of rows with more than one segment."""

    positions: Tensor
    segment_ids: Tensor
    parent_ids: Tensor
    plan: SegmentPlan

    def allowed(self) -> Tensor:
        """[B, Q, K]: a token sees its own and its parent's segment, up to its position."""
        query, key = self.segment_ids[:, :, None], self.segment_ids[:, None, :]
        related = (query == key) | (self.parent_ids[:, :, None] == key)
        causal = self.positions[:, None, :] <= self.positions[:, :, None]
        return related & causal & (query >= 0) & (key >= 0)


def policy_inputs(microbatch: Microbatch, device: torch.device) -> PolicyInputs:
    """The arrays of a microbatch as tensors on ``device``."""
    rows, columns = np.nonzero(microbatch.loss_mask)
    if not rows.size:
        rows = columns = np.zeros(1, np.int64)
    tree = None
    if not _is_plain(microbatch):
        tree = tree_layout(
            microbatch.positions, microbatch.segment_ids, microbatch.parent_ids, device
        )
    return PolicyInputs(
        token_ids=_tensor(microbatch.token_ids, device),
        loss_mask=torch.tensor(microbatch.loss_mask, device=device),
        rows=_tensor(rows, device),
        columns=_tensor(columns, device),
        predictors=_tensor(microbatch.predictors[rows, columns], device),
        tree=tree,
    )


def tree_layout(
    positions: IntArray, segment_ids: IntArray, parent_ids: IntArray, device: torch.device
) -> TreeLayout:
    """The layout of a microbatch's arrays [B, T]."""
    return TreeLayout(
        positions=_tensor(positions, device).clamp(min=0),
        segment_ids=_tensor(segment_ids, device),
        parent_ids=_tensor(parent_ids, device),
        plan=make_plan(positions, segment_ids, parent_ids, device),
    )


def _tensor(array: Any, device: torch.device) -> Tensor:
    return torch.tensor(array, dtype=torch.long, device=device)


def _is_plain(microbatch: Microbatch) -> bool:
    """One segment a row, from column 0, padded on the right: causal attention needs no mask."""
    real = microbatch.segment_ids >= 0
    counted = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    alone = microbatch.segment_ids == microbatch.segment_ids[:, :1]
    return bool(
        (microbatch.parent_ids < 0).all()
        and (alone | ~real).all()
        and (microbatch.positions == counted)[real].all()
        and (real == (counted < real.sum(1, keepdims=True))).all()
    )


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
        self.shard: SequenceShard | None = None
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


def load_policy(
    section: ModelSection,
    *,
    seed: int,
    dtype: torch.dtype,
    temperature: float,
    gradient_checkpointing: bool = False,
) -> PolicyModel:
    """Loads the policy on CPU and probes that it computes what the Hugging Face model computes.

    Raises:
        ConfigError: the model does not load, keeps parameters in several dtypes, or makes its
            logits in a way that is not known here.
    """
    model = load_model(section, seed=seed, dtype=dtype)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds != {dtype}:
        raise ConfigError(
            f"{section.path!r} keeps parameters in {sorted(map(str, kinds))}, not only in {dtype}",
            "set model.dtype: float32",
        )
    from raygrpo.learner.loading import find_layout

    # The comparison is of exact mathematics: bfloat16's rounding would hide a real difference.
    probed = model if dtype == torch.float32 else copy.deepcopy(model).float()
    layout = find_layout(probed)
    if layout == "packed":
        use_segments(model)
    return PolicyModel(
        model,
        temperature=temperature,
        layout=layout,
        fp32_head=section.fp32_head,
        gradient_checkpointing=gradient_checkpointing,
    )
