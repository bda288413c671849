"""Prompt rendering, lengths, and the resumable order of prompts over a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.data.prompts import PromptSource
from raygrpo.data.sources import load_rows
from raygrpo.errors import ConfigError, DataError
from tests.data.data_cases import ROWS, chat_tokenizer, ids_of, section, source_of
from tests.tiny import tiny_tokenizer

# Order and cursor.


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    source = source_of(ROWS)
    epochs = [[source.next().id for _ in ROWS] for _ in range(3)]
    names = {f"row-{i}" for i in range(len(ROWS))}
    assert all(set(epoch) == names for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert source.epoch == 3.0


def test_the_order_depends_on_the_seed_and_the_stream_alone() -> None:
    def order(seed: int, stream: Any) -> list[str]:
        rows = datasets.Dataset.from_list(ROWS)
        source = PromptSource(rows, section(), tiny_tokenizer(), seed=seed, stream=stream)
        return [source.next().id for _ in range(20)]

    assert order(3, "train") == order(3, "train")
    assert order(3, "train") != order(4, "train")
    assert order(3, "train") != order(3, "eval")


def test_without_shuffling_the_dataset_keeps_its_order() -> None:
    source = source_of(ROWS, shuffle=False)
    wanted = [f"row-{i % len(ROWS)}" for i in range(2 * len(ROWS) + 1)]
    assert [source.next().id for _ in wanted] == wanted


@settings(max_examples=25, deadline=None)
@given(before=st.integers(0, 20), after=st.integers(1, 20), seed=st.integers(0, 5))
def test_a_restored_stream_goes_on_where_it_was(before: int, after: int, seed: int) -> None:
    first = source_of(ROWS, seed=seed)
    for _ in range(before):
        first.next()
    state = json.loads(json.dumps(first.state()))
    second = source_of(ROWS, seed=seed)
    second.restore(state)
    assert second.epoch == first.epoch
    for _ in range(after):
        one, other = first.next(), second.next()
        assert one.id == other.id
        assert one.columns == other.columns
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_changed_data_is_refused_on_restore() -> None:
    state = source_of(ROWS).state()
    other_prompt = [*ROWS[:-1], {"prompt": "9 plus 9=", "answer": "12"}]
    other_answer = [*ROWS[:-1], {**ROWS[-1], "answer": "13"}]
    for changed in (other_prompt, other_answer):
        with pytest.raises(DataError, match="changed since the checkpoint"):
            source_of(changed).restore(state)
    source_of([dict(reversed(row.items())) for row in ROWS]).restore(state)


def test_take_gives_the_top_without_moving_the_stream() -> None:
    source = source_of(ROWS)
    assert [prompt.id for prompt in source.take(3)] == ["row-0", "row-1", "row-2"]
    assert len(source.take(100)) == len(ROWS)
    assert source.epoch == 0


# Rendering.


def test_text_prompts_and_columns_as_trl_gives_them() -> None:
    prompt = source_of(ROWS, shuffle=False).next()
    assert prompt.text == "0 plus 0="
    assert prompt.messages is None
    assert prompt.token_ids.tolist() == ids_of("0 plus 0=")
    assert prompt.columns == {"answer": "0"}


def test_a_template_replaces_the_prompt_column() -> None:
    rows = [{"question": "2+2", "answer": "4", "about": {"level": 3}}]
    template = "{{Q}} {question} ({about[level]})="
    prompt = source_of(rows, template=template).next()
    assert prompt.text == "{Q} 2+2 (3)="
    assert prompt.token_ids.tolist() == ids_of("{Q} 2+2 (3)=")


def test_chat_true_wraps_text_as_a_user_turn() -> None:
    rows = [{"prompt": "hi"}]
    for opening in ("", "ok "):
        keys: dict[str, Any] = {"chat": True, "chat_params": {"opening": opening}}
        prompt = source_of(rows, tokenizer=chat_tokenizer(), **keys).next()
        assert list(prompt.messages or ()) == [{"role": "user", "content": "hi"}]
        assert prompt.token_ids.tolist() == ids_of(f"<user>hi\n<assistant>{opening}")
    assert source_of(rows, tokenizer=chat_tokenizer()).next().text == "hi"


def with_special_tokens(*, bos: bool, eos: bool) -> Any:
    """The tiny tokenizer that puts <unk> in front (as a BOS) or <eos> behind every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer()
    single = f"{'<unk> ' if bos else ''}$A{' <eos>' if eos else ''}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_text_gets_a_bos_but_never_an_appended_eos(bos: bool, eos: bool) -> None:
    tokenizer = with_special_tokens(bos=bos, eos=eos)
    added = len(tokenizer("hi")["input_ids"]) - len(ids_of("hi"))
    assert added == bos + eos  # the tokenizer really does it
    text = source_of([{"prompt": "hi"}], tokenizer=tokenizer).next()
    assert text.token_ids.tolist() == [2] * bos + ids_of("hi")
    chat = source_of([{"prompt": "hi"}], tokenizer=tokenizer, chat=True).next()
    assert chat.token_ids.tolist() == ids_of("<user>hi\n<assistant>")


# Length.


LONG = [{"prompt": "abc"}, {"prompt": "abcdefgh"}, {"prompt": "abcd"}]


def test_overlong_prompts_can_be_dropped_and_are_counted() -> None:
    source = source_of(LONG, max_prompt_length=4, overlong="drop")
    assert source.num_dropped == 1
    assert {source.next().id for _ in range(2)} == {"row-0", "row-2"}


def test_overlong_prompts_can_keep_their_end() -> None:
    source = source_of(LONG, max_prompt_length=4, overlong="truncate_left", shuffle=False)
    prompts = source.take(3)
    assert prompts[1].token_ids.tolist() == ids_of("efgh")
    assert prompts[1].text == "abcdefgh"
    assert prompts[2].token_ids.tolist() == ids_of("abcd")


# Errors.

CHAT = chat_tokenizer()
REFUSING = chat_tokenizer()
REFUSING.chat_template = "{{ raise_exception('roles must alternate') }}"
MESSAGES = [{"prompt": [{"role": "user", "content": "hi"}]}]
PAST_A_BATCH = [{"prompt": "ab"}] * 2500 + [{"prompt": "abcde"}]


@pytest.mark.parametrize(
    ("rows", "keys", "error", "says"),
    [
        (ROWS, {"columns": {"prompt": "promt"}}, DataError, "did you mean 'prompt'"),
        (ROWS, {"template": "{question}"}, DataError, r"question.*\n.*columns: prompt, answer"),
        (ROWS, {"template": "{anser}"}, DataError, "did you mean 'answer'"),
        (ROWS, {"template": "{prompt"}, ConfigError, r"data\.template"),
        *(
            ([{"prompt": bad}], {"tokenizer": CHAT}, DataError, "row 0")
            for bad in (3, None, ["hi"], [{"content": "hi"}], [])
        ),
        ([{"prompt": "a"}, {"prompt": ""}], {}, DataError, "row 1 has an empty prompt"),
        (LONG, {"max_prompt_length": 4}, DataError, r"row 1 has a prompt of 8 tokens.*\(4\)"),
        (LONG, {"max_prompt_length": 2, "overlong": "drop"}, DataError, "no prompt is within"),
        (PAST_A_BATCH, {"max_prompt_length": 4}, DataError, "row 2500"),
        (ROWS, {"chat": True}, ConfigError, r"data\.chat"),
        (MESSAGES, {}, ConfigError, "no chat template"),
        (MESSAGES, {"tokenizer": CHAT, "chat": False}, ConfigError, r"data\.chat is false"),
        (ROWS, {"tokenizer": REFUSING, "chat": True}, DataError, "row 0: roles must alternate"),
    ],
)
def test_what_is_wrong_is_named(rows: Any, keys: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        source_of(rows, **keys)


# The embedded task.


def test_the_echo_example_is_balanced_held_out_and_tokenised_losslessly() -> None:
    from raygrpo.config.file import load_config
    from raygrpo.models import load_model, load_tokenizer, stop_token_ids

    root = Path(__file__).resolve().parents[2]
    config = load_config(root / "examples/echo/config.yaml")
    model = config.model.model_copy(update={"path": str(root / config.model.path)})
    tokenizer = load_tokenizer(model)
    rows = {}
    for name, source in (("train", config.data.source), ("test", config.eval.data.source)):
        where = config.data.model_copy(update={"source": str(root / str(source))})
        rows[name] = load_rows(where, seed=0)
        for prompt in PromptSource(rows[name], where, tokenizer, seed=0).take(10_000):
            assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert set(rows["train"]["prompt"]).isdisjoint(rows["test"]["prompt"])
    answers = list(rows["test"]["answer"])
    assert max(answers.count(answer) for answer in answers) / len(answers) == 0.1
    import torch

    network = load_model(model, seed=0, dtype=torch.float32)
    assert network.config.vocab_size == len(tokenizer)
    assert stop_token_ids(network, tokenizer) == {tokenizer.eos_token_id}
