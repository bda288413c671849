"""Sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509): ranks share a row's tokens.

Consecutive ranks form a group that computes the same microbatches. Each rank holds a run of every
row's columns. Around attention an all-to-all trades columns for heads, so that attention sees whole
rows under any mask. Each rank computes the logprobs that its hidden states predict, and sends them
to the other ranks of the group: all compute the same loss of whole rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from raygrpo.algorithm.logprobs import ExpectedGrad
from raygrpo.errors import ConfigError
from raygrpo.models import attention_masks, refuse_unknown

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from raygrpo.algorithm.shapes import FloatN, IntBT, IntChunk
    from raygrpo.learner.inputs import PolicyInputs
    from raygrpo.learner.policy import PolicyModel

_ATTENTION = "raygrpo_ulysses"


def check_attention(config: Any, size: int) -> None:
    """Refuses a model, by its Hugging Face configuration, whose rows ``size`` ranks cannot share.

    Raises:
        ConfigError: its attention heads cannot be divided among them, or do more than SDPA's.
    """
    if size == 1:
        return
    text = config.get_text_config()
    if text.num_attention_heads % size:
        raise ConfigError(
            f"learner.sequence_parallel {size} does not divide the model's "
            f"{text.num_attention_heads} heads",
            "choose a divisor",
        )
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    # A model whose attention SDPA cannot compute is loaded with its own ("eager").
    if capped or getattr(config, "_attn_implementation", None) == "eager":
        what = "caps its logits" if capped else "is not that of SDPA"
        raise ConfigError(
            f"learner.sequence_parallel is {size}, but the attention of models of type "
            f"{text.model_type!r} {what}",
            "set learner.sequence_parallel: 1",
        )


class SequenceShard:
    """One rank's part in computing a policy's rows (see `PolicyModel.share_rows`).

    All ranks construct it at once, after the process group.

    Raises:
        ConfigError: see `check_attention`.
    """

    def __init__(self, model: Any, *, rank: int, num_ranks: int, size: int) -> None:
        from transformers import AttentionInterface

        check_attention(model.config, size)
        groups = [dist.new_group(list(range(r, r + size))) for r in range(0, num_ranks, size)]
        self._group, self._index, self._size = groups[rank // size], rank % size, size
        self.attention = _ATTENTION
        AttentionInterface.register(_ATTENTION, UlyssesAttention(self._group, self._size))

    def forward(self, policy: PolicyModel, inputs: PolicyInputs) -> tuple[FloatN, FloatN]:
        """Logprobs and entropies of all trained tokens, with gradient, on every rank."""
        start, hidden = self._hidden(policy, inputs)
        local = inputs.predictors - start
        mine = (local >= 0) & (local < hidden.shape[1])
        # Every rank passes through the head: under ZeRO-3 the ranks gather its weight together.
        picked = mine.nonzero()[:, 0] if mine.any() else torch.zeros_like(local[:1])
        columns = local[picked].clamp(0, hidden.shape[1] - 1)
        targets = inputs.token_ids[inputs.rows, inputs.columns][picked]
        expected = None if inputs.expected_grad is None else _of(inputs.expected_grad, picked)
        values = policy.logprob_head(hidden[inputs.rows[picked], columns], targets, expected)
        kept = mine[picked]
        written = (v.new_zeros(len(mine)).index_put((picked,), v * kept) for v in values)
        logprobs, entropies = (_sum_over_group(value, self._group) for value in written)
        return logprobs, entropies

    def _hidden(
        self, policy: PolicyModel, inputs: PolicyInputs
    ) -> tuple[int, Float[Tensor, "B T/size H"]]:
        """The first column of this rank's run, and the run's last hidden states."""
        num_rows, length = inputs.token_ids.shape
        padding = -length % self._size
        run = (length + padding) // self._size
        here = slice(self._index * run, (self._index + 1) * run)
        positions = torch.arange(length + padding, device=inputs.token_ids.device)
        positions = positions.expand(num_rows, -1)
        masks = None
        model = policy.model
        if inputs.tree is not None:
            positions = _pad(inputs.tree.positions, padding)
            allowed = torch.nn.functional.pad(inputs.tree.allowed(), (0, padding, 0, padding))
            masks = attention_masks(model.config, allowed, positions, positions, model.dtype)
        output = model.base_model(
            input_ids=_pad(inputs.token_ids, padding)[:, here],
            position_ids=positions[:, here],
            attention_mask=masks,
            use_cache=False,
        )
        return here.start, output.last_hidden_state


def _of(gradient: ExpectedGrad, picked: IntChunk) -> ExpectedGrad:
    """The expected gradient of the picked tokens, numbered among themselves."""
    return lambda which, *values: gradient(picked[which], *values)


def _pad(values: IntBT, count: int) -> Int[Tensor, "B T+count"]:
    return torch.nn.functional.pad(values, (0, count))


def _sum_over_group(value: FloatN, group: Any) -> FloatN:
    total: Tensor = _SumOverGroup.apply(value, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverGroup(torch.autograd.Function):
    """Adds up tensors of which each rank wrote its own part.

    Every rank has the same loss, so the gradient of a part is the gradient of the sum, once.
    """

    @staticmethod
    def forward(ctx: Any, value: FloatN, group: Any) -> FloatN:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: FloatN) -> tuple[FloatN, None]:
        return gradient, None


class UlyssesAttention:
    """An attention function of transformers for rows whose columns a group of ranks shares."""

    def __init__(self, group: Any, size: int) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._attention = DistributedAttention(_attend, group, scatter_idx=2, gather_idx=1)
        self._size = size

    def __call__(
        self,
        module: Any,
        query: Float[Tensor, "B heads T/size D"],
        key: Float[Tensor, "B key_heads T/size D"],
        value: Float[Tensor, "B key_heads T/size D"],
        attention_mask: Float[Tensor, "B 1 T T"] | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "B T/size heads D"], None]:
        refuse_unknown(options, "sequence parallelism")
        if key.shape[1] % self._size:
            repeats = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
        parts = (t.transpose(1, 2).contiguous() for t in (query, key, value))
        known = {"mask": attention_mask, "scale": scaling, "window": sliding_window}
        return self._attention(*parts, 0, None, **known), None


def _attend(
    query: Float[Tensor, "B T heads D"],
    key: Float[Tensor, "B T key_heads D"],
    value: Float[Tensor, "B T key_heads D"],
    *,
    mask: Float[Tensor, "B 1 T T"] | None,
    scale: float | None,
    window: int | None,
) -> Float[Tensor, "B T heads D"]:
    """Attention over whole rows; without a mask causal, within the window."""
    length, repeats = query.shape[1], query.shape[2] // key.shape[2]
    if mask is None and window is not None and window < length:
        index = torch.arange(length, device=query.device)
        distance = index[:, None] - index
        mask = torch.zeros(length, length, dtype=query.dtype, device=query.device)
        mask.masked_fill_((distance < 0) | (distance >= window), torch.finfo(query.dtype).min)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, is_causal=mask is None
    )
    return output.transpose(1, 2).contiguous()
