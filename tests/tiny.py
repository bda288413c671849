"""Tiny random models with a character-level tokenizer, as directories that `load_model` reads."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raygrpo.engines.hf.sampling import penalise, truncate
from raygrpo.models import quiet_transformers, stop_token_ids
from raygrpo.types import Completion, GroupRequest

Kind = Literal["llama", "qwen2", "gemma3"]
CHARACTERS = string.digits + string.ascii_letters + " \n+-*/=.,:;!?()[]<>#'\"_"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def tiny_tokenizer() -> Any:
    """A fast tokenizer of one token a character: ids 0 to 2 are <pad>, <eos> and <unk>.

    ``decode`` of ``encode`` is the text itself; no token is added to it, and characters outside
    `CHARACTERS` are dropped. It is byte-level BPE without merges because AutoTokenizer gives every
    Qwen2 directory that form, whatever its files say.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    written = CHARACTERS.replace(" ", "Ġ").replace("\n", "Ċ")
    vocab = {token: index for index, token in enumerate([PAD, EOS, UNK, *written])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(kind: Kind, *, max_positions: int = 512) -> Any:
    """Llama (own head, grouped queries), Qwen2 (tied head, biases) or Gemma 3 text (window 8)."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

    tokenizer = tiny_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_positions,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "llama":
        return LlamaConfig(**common, tie_word_embeddings=False)
    if kind == "qwen2":
        return Qwen2Config(**common, tie_word_embeddings=True)
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3TextConfig(**common, **windows, head_dim=8, query_pre_attn_scalar=8)


def save_tiny_model(
    directory: Path | str, kind: Kind = "llama", seed: int = 0, *, max_positions: int = 512
) -> Path:
    """Saves configuration, random fp32 weights and tokenizer; returns the directory.

    The weights are drawn wider than transformers draws them, so that the next-token distribution
    is far from uniform and differs from position to position; the global generator is untouched.
    """
    from transformers import AutoModelForCausalLM

    path = Path(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, max_positions=max_positions))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.25)
    with quiet_transformers():
        model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def forced(model: Any, item: GroupRequest, completion: Completion) -> Tensor:
    """Logprobs [C] that a full forward pass of transformers gives the completion's tokens."""
    prompt, written = item.prompt.token_ids, completion.token_ids
    ids = torch.from_numpy(np.concatenate([prompt, written]).astype(np.int64))
    sampling, rows = item.sampling, []
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0, prompt.size - 1 : -1].float()
        logits[: sampling.min_tokens, sorted(stop_token_ids(model, None))] = -torch.inf
        for end, row in enumerate(logits, start=prompt.size):
            scores = penalise(row[None], ids[None, :end], sampling.repetition_penalty)
            rows.append(truncate(scores, sampling).log_softmax(-1)[0, ids[end]])
    return torch.stack(rows)
