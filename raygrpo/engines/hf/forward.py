"""A model's forward passes for decoding: from token ids and a cache to the next token's logits."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raygrpo.engines.hf.cache import SlotCache
from raygrpo.engines.hf.shared_prompts import SharedPrompts, share_prompts, use_shared_prompts
from raygrpo.models import attention_masks, logit_transform
from raygrpo.types import FloatArray

log = logging.getLogger(__name__)

PREFILL_CHUNK = 1024
# A prompt shorter than this share of a batch's longest goes to the next batch.
_ALIKE = 0.75
SCORE_CHUNK = 128
Indices = npt.NDArray[np.int64]
# How far shared prompts may move the logits, as a share of their norm. A layer that reads shared
# prompts wrongly moves them much further.
_SHARING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Forward:
    """The forward passes of one model, in inference mode.

    Attributes:
        shares_prompts: whether `decode` can read prompts from slots of a separate cache.
    """

    def __init__(self, model: Any, device: torch.device, *, fp32_head: bool) -> None:
        self._model, self._device = model, device
        self._config = model.config
        self._decoder = model.get_decoder()
        # The argument's name depends on the version of transformers.
        renamed = "cache" in inspect.signature(self._decoder.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"
        self._head = model.get_output_embeddings()
        self._transform = logit_transform(self._config)
        self._fp32_head = fp32_head and model.dtype != torch.float32
        self._wide_head: tuple[Tensor, Tensor | None] | None = None
        self.shares_prompts = device.type == "cpu" and self._find_sharing()

    @property
    def vocab_size(self) -> int:
        """The number of logits."""
        size: int = self._head.weight.shape[0]
        return size

    def new_cache(self) -> SlotCache:
        """An empty cache for all layers."""
        return SlotCache(self._config.get_text_config().num_hidden_layers)

    def forget(self) -> None:
        """Drops tensors that were derived from the weights."""
        self._wide_head = None

    def prefill(self, cache: SlotCache, row: int, tokens: Indices, begin: int) -> Tensor:
        """Computes positions [begin, len(tokens)) of one row of the cache.

        ``tokens`` are the row's ids from position 0 on. Returns the logits [1, V] after the last.
        """
        ids = torch.from_numpy(tokens).to(self._device)[None]
        for start in range(begin, tokens.size, PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, tokens.size)
            cache.plan_prefill([row], start, stop)
            hidden = self.causal(cache, ids[:, start:stop], start)
        return self._logits(hidden[:, -1])

    def prefill_prompts(
        self, cache: SlotCache, rows: Sequence[int], prompts: Sequence[Indices]
    ) -> list[Tensor]:
        """Computes prompts into rows of the cache, prompts of similar length together.

        Returns the logits [V] after each prompt.
        """
        after: dict[int, Tensor] = {}
        for batch in _batches([prompt.size for prompt in prompts]):
            if len(batch) == 1:
                after[batch[0]] = self.prefill(cache, rows[batch[0]], prompts[batch[0]], 0)[0]
                continue
            ends = torch.tensor([prompts[i].size - 1 for i in batch], device=self._device)
            width = int(ends[0]) + 1
            # A prompt is padded with its own last id: an embedding that is not finite spoils no
            # prompt without that id.
            ids = np.stack(
                [np.pad(prompts[i], (0, width - prompts[i].size), mode="edge") for i in batch]
            )
            cache.plan_prefill([rows[i] for i in batch], 0, width)
            hidden = self.causal(cache, torch.from_numpy(ids).to(self._device), 0)
            logits = self._logits(hidden[torch.arange(len(batch), device=self._device), ends])
            after.update(zip(batch, logits, strict=True))
        return [after[i] for i in range(len(prompts))]

    def causal(self, cache: SlotCache, ids: Tensor, start: int) -> Tensor:
        """Hidden states of ids [R, Q] at positions from ``start`` on."""
        stop = start + ids.shape[1]
        positions = torch.arange(start, stop, device=self._device)[None]
        keys = torch.arange(stop, device=self._device)[None]
        return self._hidden(cache, ids, positions, keys[:, None] <= positions[..., None], keys)

    def decode(
        self,
        cache: SlotCache,
        ids: Tensor,
        positions: Indices,
        bases: Indices,
        prompts: SharedPrompts | None = None,
    ) -> Tensor:
        """The logits [R, V] after one more token in each of the first R rows of the cache.

        ``ids`` [R] stand at ``positions`` [R]. A row's positions before ``bases`` [R] are in
        ``prompts``; its own part of the cache begins at its base.
        """
        own = torch.from_numpy(positions - bases).to(self._device)
        stop = int((positions - bases).max()) + 1
        cache.plan_decode(own, stop)
        where, base = (torch.from_numpy(a).to(self._device)[:, None] for a in (positions, bases))
        keys = base + torch.arange(stop, device=self._device)
        allowed = keys <= where
        if prompts is not None:
            before = torch.arange(prompts.length, device=self._device).expand(len(ids), -1)
            keys, allowed = torch.cat([before, keys], 1), torch.cat([before < base, allowed], 1)
        options = {} if prompts is None else {"prompts": prompts}
        hidden = self._hidden(cache, ids[:, None], where, allowed[:, None], keys, **options)
        return self._logits(hidden[:, 0])

    def score(self, token_ids: Sequence[int], temperature: float) -> FloatArray:
        """Logprobs [T] of each token given the tokens before it, by one pass without a cache."""
        ids = torch.tensor(list(token_ids), dtype=torch.int64, device=self._device)
        hidden = self._decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        scores = np.zeros(len(ids), np.float32)
        for start in range(0, len(ids) - 1, SCORE_CHUNK):
            predicted = ids[start + 1 : start + 1 + SCORE_CHUNK]
            logits = self._logits(hidden[start : start + len(predicted)]) / temperature
            logprobs = logits.log_softmax(-1).gather(-1, predicted[:, None])[:, 0]
            scores[start + 1 : start + 1 + len(predicted)] = logprobs.cpu().numpy()
        return scores

    def _hidden(
        self,
        cache: SlotCache,
        ids: Tensor,
        positions: Tensor,
        allowed: Tensor,
        keys: Tensor,
        **options: Any,
    ) -> Tensor:
        """Hidden states [R, Q, H] of ids [R, Q].

        ``keys`` [R, K] are the keys' positions; a query sees a key where ``allowed`` [R, Q, K].
        """
        masks = attention_masks(self._config, allowed, positions, keys, self._model.dtype)
        output = self._decoder(
            input_ids=ids,
            attention_mask=masks,
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
            **options,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        if not self._fp32_head:
            return self._transform(self._head(hidden).float())
        if self._wide_head is None:
            bias = self._head.bias
            self._wide_head = self._head.weight.float(), None if bias is None else bias.float()
        return self._transform(torch.nn.functional.linear(hidden.float(), *self._wide_head))

    @torch.inference_mode()
    def _find_sharing(self) -> bool:
        """Tries shared prompts on the model, and keeps them if the model decodes right."""
        own = self._config._attn_implementation
        reason = self._sharing_problem() if own == "sdpa" else f"their attention is {own}"
        if reason is not None:
            kind = self._config.model_type
            log.warning(
                "each row of a group keeps its prompt, for models of type %r: %s", kind, reason
            )
            self._model.set_attn_implementation(own)
        return reason is None

    def _sharing_problem(self) -> str | None:
        """Decodes two tokens of three rows: two with prompts in slots, one with its own prompt.

        Returns the problem; None if the logits agree with passes without a cache.
        """
        lengths, bases, slots = np.array([5, 3, 2]), np.array([5, 3, 0]), np.array([1, 0, -1])
        tokens = np.arange(1, 17) * 7919 % self.vocab_size
        rows = np.split(tokens, np.cumsum(lengths + 2)[:-1])
        try:
            expected = [self._last_logits(row) for row in rows]
            use_shared_prompts(self._model)
            cache, prompts = self.new_cache(), self.new_cache()
            cache.reserve(3, 4)
            prompts.reserve(2, 5)
            self.prefill_prompts(prompts, slots[:2].tolist(), [rows[0][:5], rows[1][:3]])
            self.prefill(cache, 2, rows[2][:2], 0)
            for place in range(2):
                ids = np.array([row[n + place] for row, n in zip(rows, lengths, strict=True)])
                shared = share_prompts(prompts.layers, slots, bases)
                found = self.decode(cache, torch.from_numpy(ids), lengths + place, bases, shared)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # Whether layers take the extra argument shows only in a call.
            return f"{type(error).__name__}: {error}"
        off = float((found - torch.cat(expected)).norm() / torch.cat(expected).norm())
        most = _SHARING_TOLERANCE[self._model.dtype]
        return None if off <= most else f"their logits are {off:.2g} off, more than {most}"

    def _last_logits(self, tokens: Indices) -> Tensor:
        ids = torch.from_numpy(tokens)[None]
        return self._logits(self._decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1])


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by falling length, in batches of similar length.

    A batch of several prompts has at most `PREFILL_CHUNK` tokens, padding included.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= PREFILL_CHUNK
        if fits and lengths[index] >= _ALIKE * longest:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
