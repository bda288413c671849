"""Writes what the echo example trains on: a tiny model's configuration, its tokenizer, the data.

    python examples/echo/make_model.py

The task: a prompt such as ``k 7:`` asks for ``7`` and the end of the sequence. Train and test
hold different pairs of letter and digit, each digit equally often, so that a constant answer scores
0.1. The model has no weights here: the run builds them from its seed (``model.random_init``).
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

HERE = Path(__file__).resolve().parent
ALPHABET = string.digits + string.ascii_lowercase + " :+-=."
SPACE_BYTE = "Ġ"  # how byte-level BPE writes a space
TEST_LETTERS_PER_DIGIT = 6


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; an end-of-sequence token that the tokenizer never adds by itself.

    It is byte-level BPE without merges, because AutoTokenizer reads every Qwen2 directory as that.
    """
    vocabulary = ["<pad>", "<eos>", "<unk>", *ALPHABET.replace(" ", SPACE_BYTE)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """A Qwen2 of 0.5 million parameters."""
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_rows(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All pairs of a letter and a digit, as (train, test), in random order."""
    rng = random.Random(seed)
    train, test = [], []
    for digit in string.digits:
        letters = list(string.ascii_lowercase)
        rng.shuffle(letters)
        rows = [{"prompt": f"{letter} {digit}:", "answer": digit} for letter in letters]
        test += rows[:TEST_LETTERS_PER_DIGIT]
        train += rows[TEST_LETTERS_PER_DIGIT:]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Writes model/, train.jsonl and test.jsonl beside this file."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    tokenizer.save_pretrained(HERE / "model")
    config.save_pretrained(HERE / "model")
    GenerationConfig.from_model_config(config).save_pretrained(HERE / "model")
    for name, rows in zip(("train", "test"), make_rows(), strict=True):
        write_rows(HERE / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
