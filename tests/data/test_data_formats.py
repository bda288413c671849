"""Columns, system messages, and the dataset formats that TRL documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.config import DataSection
from raygrpo.data.maker import renamed
from raygrpo.data.mixture import mixture_parts
from raygrpo.errors import ConfigError, DataError
from tests.data.data_cases import chat_tokenizer, ids_of, source_of

NAMES = st.sampled_from("abcd")
HI: dict[str, Any] = {"role": "user", "content": "hi"}


# Columns.


@given(st.dictionaries(st.sampled_from("abcdxy"), NAMES))
def test_renamed_columns_hold_what_the_old_ones_held(columns: dict[str, str]) -> None:
    row = {name: f"value of {name}" for name in "abcd"}
    found = renamed(columns, row)
    for new, old in columns.items():
        assert found[new] == row[old]
    untouched = set(row) - set(columns) - set(columns.values())
    assert {name: found[name] for name in untouched} == {name: row[name] for name in untouched}
    assert set(found) == untouched | set(columns), "an old name is gone"


def test_the_prompts_old_name_stays_and_others_go() -> None:
    rows = [{"problem": "why?", "solution": "so", "prompt": "not this"}]
    prompt = source_of(rows, columns={"prompt": "problem", "answer": "solution"}).next()
    assert prompt.text == "why?"
    assert prompt.columns == {"problem": "why?", "answer": "so"}
    filled = source_of(rows, columns={"q": "problem"}, template="Q: {q}").next()
    assert filled.text == "Q: why?"
    assert "problem" not in filled.columns


def test_columns_that_are_missing_name_the_nearest_and_the_fix() -> None:
    rows = [{"problem": "why?", "solution": "so"}]
    with pytest.raises(DataError, match=r"'solutoin' to call 'answer'\n.*'solution'"):
        source_of(rows, columns={"answer": "solutoin", "prompt": "problem"})
    with pytest.raises(DataError, match=r"no column 'prompt'\n.*\{prompt: problem\}.*template"):
        source_of(rows)
    with pytest.raises(DataError, match=r"\{prompt: prompts\}"):
        source_of([{"answer": "so", "prompts": "why?"}])


# System messages.


def test_a_system_message_goes_before_prompts_that_have_none() -> None:
    own = {"role": "system", "content": "own"}
    rows = [{"prompt": [HI]}, {"prompt": [own, HI]}]
    source = source_of(rows, tokenizer=chat_tokenizer(), system="be brief")
    first, second = source.take(2)
    system = {"role": "system", "content": "be brief"}
    assert list(first.messages or ()) == [system, HI]
    assert first.token_ids.tolist() == ids_of("<system>be brief\n<user>hi\n<assistant>")
    assert list(second.messages or ()) == [own, HI]


def test_text_gets_a_system_message_with_chat_alone() -> None:
    rows = [{"prompt": "hi"}]
    prompt = source_of(rows, tokenizer=chat_tokenizer(), chat=True, system="be brief").next()
    assert [message["role"] for message in prompt.messages or ()] == ["system", "user"]
    for keys in ({}, {"chat": False}, {"template": "{prompt}"}):
        with pytest.raises(ConfigError, match=r"(?s)data\.system.*plain text.*data\.chat: true"):
            source_of(rows, tokenizer=chat_tokenizer(), system="be brief", **keys)


def test_a_template_that_refuses_system_messages_says_so() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert source_of([{"prompt": [HI]}], tokenizer=tokenizer).next().messages
    with pytest.raises(DataError, match="row 0: no system role"):
        source_of([{"prompt": [HI]}], tokenizer=tokenizer, system="be brief")


# TRL's formats.

SKY = {"role": "user", "content": "What color is the sky?"}
TRL_FORMATS: dict[str, dict[str, Any]] = {
    "standard": {"prompt": "The sky is"},
    "conversational": {"prompt": [SKY]},
    "with a system turn": {"prompt": [{"role": "system", "content": "Be brief."}, SKY]},
    "several turns": {"prompt": [SKY, {"role": "assistant", "content": "Blue."}, HI]},
    "begun by the assistant": {"prompt": [SKY, {"role": "assistant", "content": "It is"}]},
}


@pytest.mark.parametrize("name", TRL_FORMATS)
def test_a_prompt_is_what_trl_makes_of_it(name: str) -> None:
    """The text that TRL's own template function gives, and extra columns as TRL hands them on."""
    row = TRL_FORMATS[name]
    tokenizer = chat_tokenizer()
    wanted = trl.data_utils.maybe_apply_chat_template(row, tokenizer)["prompt"]
    extra = {"solution": "blue", "level": 3, "tags": ["a", "b"]}
    prompt = source_of([{**row, **extra}], tokenizer=tokenizer).next()
    assert prompt.token_ids.tolist() == ids_of(wanted)
    assert prompt.columns == extra
    conversational = trl.data_utils.is_conversational(row)
    assert (prompt.messages is not None) == conversational
    assert (list(prompt.messages or ()) if conversational else prompt.text) == row["prompt"]


def test_the_documents_sections_are_valid() -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    sections = [DataSection.model_validate(yaml.safe_load(block)["data"]) for block in blocks]
    names = [[(part.name, part.weight) for part in mixture_parts(section)] for section in sections]
    assert names == [
        [("gsm8k", 1.0)],
        [("sums", 1.0), ("words", 0.5), ("hard", 1.0)],
        [("sums", 1.0)],
    ]
