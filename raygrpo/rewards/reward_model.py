"""A reward model: a Hugging Face sequence classifier whose logit is the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError

from raygrpo.errors import ConfigError
from raygrpo.models import DTYPES, quiet_transformers
from raygrpo.rewards.params import RewardModelParams
from raygrpo.rewards.text import completion_text


class RewardModel:
    """A model and its tokenizer on one device.

    Raises:
        ConfigError: no sequence classifier loads from ``path``, or its labels, tokenizer and
            template do not fit the parameters.
    """

    def __init__(self, params: RewardModelParams) -> None:
        self._params = params
        self._device = torch.device("cuda" if params.gpus else "cpu")
        self._tokenizer, self._model = _load(params)
        self._label = _label(params, self._model.config.num_labels)
        if params.template == "chat" and not self._tokenizer.chat_template:
            raise ConfigError(
                f"reward model {params.path!r} has no chat template", "set params.template: plain"
            )
        self._text = self._model.config.get_text_config()
        self._own_pad = self._text.pad_token_id
        longest = getattr(self._text, "max_position_embeddings", None) or params.max_length
        # The tokenizer knows of positions that are never used, such as RoBERTa's first two.
        self._max_length = min(params.max_length, longest, self._tokenizer.model_max_length)
        self._tokenizer.truncation_side = "left"
        self._model.to(self._device).eval()

    def encode(self, prompt: Any, completions: Sequence[Any]) -> tuple[list[list[int]], int]:
        """The model's token ids of each completion, and the number of completions that are cut."""
        texts, special = self._render(prompt, completions)
        whole = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        num_cut = sum(len(ids) > self._max_length for ids in whole)
        if num_cut:
            whole = self._tokenizer(
                texts, add_special_tokens=special, truncation=True, max_length=self._max_length
            )["input_ids"]
        return whole, num_cut

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The rewards of token sequences; sequences of similar length are computed together."""
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        rewards = [0.0] * len(sequences)
        size = self._params.batch_size
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            logits = self._forward([sequences[index] for index in batch])
            for index, value in zip(batch, logits, strict=True):
                rewards[index] = value
        return rewards

    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        width = max(1, *(len(ids) for ids in sequences))
        tokens = torch.full((len(sequences), width), self._padding(sequences), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(sequences):
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[row, : len(ids)] = 1
        inputs = {"input_ids": tokens.to(self._device), "attention_mask": mask.to(self._device)}
        logits = self._model(**inputs).logits[:, self._label]
        values: list[float] = logits.float().cpu().tolist()
        return values

    def _padding(self, sequences: Sequence[Sequence[int]]) -> int:
        """Decoders read their score off the last token that is not the configuration's padding.

        Without one of its own, it is a token that none of ``sequences`` ends with.
        """
        pad: int | None = self._own_pad
        if pad is None:
            ends = {ids[-1] for ids in sequences if ids}
            pad = next(token for token in range(len(ends) + 1) if token not in ends)
            self._text.pad_token_id = pad
        return pad

    def _render(self, prompt: Any, completions: Sequence[Any]) -> tuple[list[str], bool]:
        """Texts, and whether the tokenizer adds its special tokens: a chat template has its own."""
        answers = [completion_text(completion) for completion in completions]
        messages = [] if isinstance(prompt, str) else list(prompt)
        template = self._params.template or ("chat" if messages else "plain")
        if template == "plain":
            parts = [completion_text([message]) for message in messages]
            text = "\n".join([*parts, ""]) if messages else prompt
            return [text + answer for answer in answers], True
        messages = messages or [{"role": "user", "content": prompt}]
        begun = ""
        if messages[-1]["role"] == "assistant":  # a beginning, which the completions continue
            begun = completion_text([messages[-1]])
            messages = messages[:-1]
        chats = [[*messages, {"role": "assistant", "content": begun + text}] for text in answers]
        return [self._tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats], False


def _load(params: RewardModelParams) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    where = {"revision": params.revision, "trust_remote_code": False}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(params.path, **where)
            model, found = AutoModelForSequenceClassification.from_pretrained(
                params.path, dtype=DTYPES[params.dtype], output_loading_info=True, **where
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"reward model {params.path!r} does not load: {error}") from error
    if missing := sorted(found["missing_keys"]):
        # transformers would draw them at random: rewards without meaning.
        raise ConfigError(
            f"reward model {params.path!r} has no weights for {', '.join(missing[:3])}",
            "name a model that was trained to classify sequences",
        )
    return tokenizer, model


def _label(params: RewardModelParams, num_labels: int) -> int:
    if params.label is None and num_labels != 1:
        raise ConfigError(
            f"reward model {params.path!r} has {num_labels} labels",
            "say by params.label which one's logit is the reward",
        )
    label = params.label or 0
    if label >= num_labels:
        raise ConfigError(f"reward model {params.path!r} has {num_labels} labels, none is {label}")
    return label
