"""Rows, sections and tokenizers that the tests of prompts share."""

from __future__ import annotations

from typing import Any

import datasets

from raygrpo.config import DataSection
from raygrpo.data.prompts import PromptSource
from tests.tiny import tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ opening | default('') }}{% endif %}"
)
ROWS = [{"prompt": f"{i} plus {i}=", "answer": str(2 * i)} for i in range(7)]


def section(source: str = "given", **keys: Any) -> DataSection:
    return DataSection(source=source, **keys)


def source_of(
    rows: list[dict[str, Any]], *, seed: int = 0, tokenizer: Any = None, **keys: Any
) -> PromptSource:
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    return PromptSource(datasets.Dataset.from_list(rows), section(**keys), tokenizer, seed=seed)


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def ids_of(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])
