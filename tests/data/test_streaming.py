"""Streamed sources: read as they go, in an order of the seed's, resumed exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.data import streaming
from raygrpo.data.loading import make_prompts
from raygrpo.data.prompts import PromptStream
from raygrpo.errors import ConfigError, DataError
from tests.data.data_cases import section
from tests.tiny import tiny_tokenizer

SIZE = 57
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of several pieces: the library reads row groups, or as many bytes, at once."""
    file = tmp_path_factory.mktemp("streams") / f"rows.{request.param}"
    table = datasets.Dataset.from_list([{"prompt": f"{i}=", "answer": str(i)} for i in range(SIZE)])
    if request.param == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        table.to_parquet(file, batch_size=10)
    return file


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    """Several blocks in a small file, the last one short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK", 20)
        yield


def stream(path: Path, *, seed: int = 0, **keys: Any) -> PromptStream:
    params: dict[str, Any] = {"streaming": True}
    if path.suffix == ".jsonl":
        params["chunksize"] = 300
    return make_prompts(section(str(path), params=params, **keys), TOKENIZER, seed=seed)


def draw(prompts: PromptStream, count: int) -> list[tuple[str, str | None, Any]]:
    drawn = [prompts.next() for _ in range(count)]
    return [(prompt.id, prompt.text, prompt.columns["answer"]) for prompt in drawn]


def test_an_epoch_has_every_row_once_and_the_next_another_order(path: Path) -> None:
    prompts = stream(path)
    first = draw(prompts, SIZE)
    assert prompts.epoch == 0
    second = draw(prompts, SIZE)
    assert prompts.epoch == 1
    for epoch in (first, second):
        assert sorted(epoch) == sorted((f"row-{i}", f"{i}=", str(i)) for i in range(SIZE))
    assert first != second
    numbers = [int(row[4:]) for row, _, _ in first]
    assert [number // 20 for number in numbers] == [i // 20 for i in range(SIZE)]
    blocks = [[number % 20 for number in numbers[start : start + 20]] for start in (0, 20)]
    assert blocks[0] != blocks[1], "blocks are not shuffled alike"


def test_without_shuffling_the_rows_come_in_order(path: Path) -> None:
    wanted = [f"row-{i % SIZE}" for i in range(2 * SIZE + 3)]
    assert [name for name, _, _ in draw(stream(path, shuffle=False), len(wanted))] == wanted


@settings(max_examples=10, deadline=None)
@given(before=st.integers(0, 130), seed=st.integers(0, 3), shuffle=st.booleans())
def test_a_restored_stream_neither_repeats_nor_skips(
    path: Path, before: int, seed: int, shuffle: bool
) -> None:
    whole = draw(stream(path, seed=seed, shuffle=shuffle), before + 45)
    first = stream(path, seed=seed, shuffle=shuffle)
    draw(first, before)
    state = json.loads(json.dumps(first.state()))
    second = stream(path, seed=seed, shuffle=shuffle)
    second.restore(state)
    assert second.epoch == first.epoch
    assert draw(second, 45) == whole[before:]
    assert not shuffle or draw(stream(path, seed=9), 45) != whole[:45]
    assert draw(first, 45) == whole[before:], "taking the state does not move the stream"


def test_take_is_the_top_and_does_not_move_the_stream(path: Path) -> None:
    prompts, other = stream(path), stream(path)
    draw(prompts, 25)
    draw(other, 25)
    assert [prompt.id for prompt in prompts.take(3)] == ["row-0", "row-1", "row-2"]
    assert len(prompts.take(1000)) == SIZE
    assert draw(prompts, 60) == draw(other, 60)


def test_rows_are_read_when_they_are_needed() -> None:
    read = Counter[str]()

    def rows() -> Any:
        for i in range(1000):
            read["rows"] += 1
            yield {"prompt": f"{i}="}

    dataset = datasets.IterableDataset.from_generator(rows)
    prompts = make_prompts(section(), TOKENIZER, seed=0, dataset=dataset)
    assert read["rows"] <= 21
    for _ in range(21):
        prompts.next()
    assert read["rows"] <= 41


def test_long_rows_are_dropped_or_cut_when_met_and_counted_across_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "ab", "answer": ""}\n{"prompt": "abcdef", "answer": ""}\n' * 30)
    keys = {"max_prompt_length": 4, "shuffle": False}
    prompts = stream(file, overlong="drop", **keys)
    assert [name for name, _, _ in draw(prompts, 3)] == ["row-0", "row-2", "row-4"]
    assert prompts.num_dropped == 2
    assert prompts.metrics() == {"data/num_dropped": 2.0}
    resumed = stream(file, overlong="drop", **keys)
    resumed.restore(prompts.state())
    assert draw(resumed, 1)[0][0] == "row-6"
    assert resumed.num_dropped == 3
    cut = stream(file, overlong="truncate_left", **keys)
    assert [prompt.token_ids.size for prompt in (cut.next(), cut.next())] == [2, 4]
    assert cut.num_truncated == 1
    failing = stream(file, **keys)
    failing.next()
    with pytest.raises(DataError, match="row 1 has a prompt of 6 tokens"):
        failing.next()
    with pytest.raises(DataError, match="no prompt is within"):
        stream(file, overlong="drop", max_prompt_length=1).next()


def test_rows_that_cannot_be_used_are_named_when_met(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "ab"}\n' * 2 + '{"prompt": ""}\n')
    prompts = stream(file, shuffle=False)
    prompts.next(), prompts.next()
    with pytest.raises(DataError, match="row 2 has an empty prompt"):
        prompts.next()
    file.write_text('{"prompt": "ab"}\n' * 30 + "{not json}\n")
    with pytest.raises(DataError, match=r"cannot be read from row \d+ on"):
        draw(stream(file), 31)
    with pytest.raises(DataError, match="no column 'prompt'"):
        file.write_text('{"question": "ab"}\n')
        stream(file)


def test_rows_that_changed_under_the_cursor_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{i}=", "answer": str(i)}) + "\n" for i in range(40)]
    file.write_text("".join(lines))
    prompts = stream(file)
    draw(prompts, 25)
    file.write_text("".join(line.replace('"30"', '"31"') for line in lines))
    whole = make_prompts(section(str(file)), TOKENIZER, seed=0)
    for other, state in ((stream(file), prompts), (stream(file), whole), (whole, prompts)):
        with pytest.raises(DataError, match="changed since the checkpoint"):
            other.restore(state.state())


def test_a_stream_remembers_no_pass_rates(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_pass_rate.*is streamed"):
        stream(path, max_pass_rate=0.9)
