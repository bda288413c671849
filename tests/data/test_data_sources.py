"""Where rows come from: files, the hub, Python, reasoning-gym."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.config import EvalSection
from raygrpo.data.prompts import PromptSource
from raygrpo.data.sources import decode_metadata, encode_metadata, eval_section, load_rows
from raygrpo.errors import ConfigError, DataError
from tests.data.data_cases import ROWS, section
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_local_files_give_the_rows_that_were_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    table = datasets.Dataset.from_list([{"prompt": "a b,c", "n": 1}, {"prompt": 'd "e"', "n": 2}])
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif suffix == "json":
        path.write_text(json.dumps(list(table)))
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    assert load_rows(section(str(path)), seed=0).to_list() == table.to_list()


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "old"}\n')
    assert load_rows(section(str(path)), seed=0)["prompt"][0] == "old"
    path.write_text('{"prompt": "newer"}\n')
    assert load_rows(section(str(path)), seed=0)["prompt"][0] == "newer"


def test_a_dataset_from_python_is_taken_as_it_is() -> None:
    given_rows = datasets.Dataset.from_list(ROWS)
    assert load_rows(section("no/such.jsonl"), seed=0, dataset=given_rows) is given_rows
    with pytest.raises(ConfigError, match="DatasetDict"):
        load_rows(section(), seed=0, dataset=datasets.DatasetDict({"train": given_rows}))


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("missing.jsonl", None, ConfigError, r"no file '.*missing\.jsonl'"),
        ("empty.jsonl", "", DataError, "empty file"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', DataError, "cannot be read"),
        ("header.csv", "prompt,answer\n", DataError, "no rows"),
    ],
)
def test_missing_empty_and_broken_files(
    tmp_path: Path, name: str, content: str | None, error: type[Exception], says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=says):
        load_rows(section(str(tmp_path / name)), seed=0)


def test_a_hub_id_that_is_not_found_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no-such-owner/no-such-set"):
        load_rows(section("no-such-owner/no-such-set"), seed=0)


def test_params_are_the_loaders_arguments(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt;answer\na,b;1\n")
    rows = load_rows(section(str(path), params={"delimiter": ";"}), seed=0)
    assert rows.to_list() == [{"prompt": "a,b", "answer": 1}]
    with pytest.raises(ConfigError, match=r"data\.params.*'delimeter'"):
        load_rows(section(str(path), params={"delimeter": ";"}), seed=0)
    with pytest.raises(ConfigError, match=r"data\.params.*'size'"):
        load_rows(section(str(path), params={"size": 3, "streaming": True}), seed=0)


# reasoning-gym.


def test_gym_rows_are_the_tasks_own_and_follow_the_seed() -> None:
    import reasoning_gym

    wanted = reasoning_gym.create_dataset("chain_sum", size=5, seed=11, min_terms=2, max_terms=2)
    gym = section("reasoning_gym:chain_sum", columns={"prompt": "question"})
    asked = {"size": 5, "min_terms": 2, "max_terms": 2}
    rows = load_rows(gym.model_copy(update={"params": asked}), seed=11)
    assert rows["question"][:] == [wanted[i]["question"] for i in range(5)]
    assert rows["answer"][:] == [wanted[i]["answer"] for i in range(5)]
    other = load_rows(gym.model_copy(update={"params": asked}), seed=12)
    assert other["question"][:] != rows["question"][:]
    explicit = load_rows(gym.model_copy(update={"params": {**asked, "seed": 11}}), seed=99)
    assert explicit["question"][:] == rows["question"][:]


@pytest.mark.parametrize("task", ["chain_sum", "rearc", "countdown", "graph_color"])
def test_gym_metadata_reaches_rewards_as_the_task_made_it(task: str) -> None:
    import reasoning_gym

    made = reasoning_gym.create_dataset(task, size=3, seed=5)
    gym = section(f"reasoning_gym:{task}", columns={"prompt": "question"}, params={"size": 3})
    gym = gym.model_copy(update={"max_prompt_length": 100_000})
    source = PromptSource(load_rows(gym, seed=5), gym, tiny_tokenizer(), seed=5)
    for index, prompt in enumerate(source.take(3)):
        entry = made[index]
        columns = prompt.columns
        assert columns["metadata"].keys() == entry["metadata"].keys()
        mine = {k: columns[k] for k in ("question", "answer", "metadata")}
        answer = entry["answer"] or str(entry["metadata"].get("possible_answer"))
        assert made.score_answer(answer, mine) == made.score_answer(answer, entry)


@pytest.mark.parametrize(
    ("task", "params", "says"),
    [
        ("chain_sums", {}, "did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 2}, "did you mean 'max_terms'"),
        ("chain_sum", {"min_terms": 9}, r"data\.params of chain_sum"),
    ],
)
def test_gym_errors_name_the_nearest(task: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_rows(section(f"reasoning_gym:{task}", params=params), seed=0)


def evaluation(data: dict[str, Any]) -> EvalSection:
    return EvalSection.model_validate({"data": data})


def test_evaluation_rows_of_the_same_task_are_others() -> None:
    params = {"size": 200, "min_terms": 6, "max_terms": 6, "min_digits": 4, "max_digits": 4}
    train = section("reasoning_gym:chain_sum", params=params)
    held_out = eval_section(train, evaluation({"params": {"size": 50}}), seed=0)
    train_rows, held_rows = load_rows(train, seed=0), load_rows(held_out, seed=0)
    assert len(held_rows) == 50
    # A shift by fewer than 200 would repeat rows, since row i is drawn from seed + i.
    assert set(train_rows["question"]).isdisjoint(held_rows["question"])
    named = eval_section(train, evaluation({"params": {"seed": 3}}), seed=0)
    assert named.params == {**params, "seed": 3}
    moved = eval_section(train, evaluation({"source": "x.jsonl"}), seed=0)
    assert (moved.source, moved.params) == ("x.jsonl", {})


@pytest.mark.parametrize(
    ("data", "params"),
    [
        ({}, {"name": "main", "split": "test"}),
        ({"params": {"split": "dev"}}, {"name": "main", "split": "dev"}),
        ({"source": "c/d"}, {"split": "test"}),
        ({"source": "c/d", "params": {"name": "x"}}, {"name": "x", "split": "test"}),
    ],
)
def test_evaluation_reads_the_test_split_of_the_hub_unless_told(
    data: dict[str, Any], params: dict[str, Any]
) -> None:
    train = section("a/b", params={"name": "main", "split": "train[:90%]"})
    assert eval_section(train, evaluation(data), seed=0).params == params


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text().filter(lambda key: key != "__tuple__"), inner)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_metadata_survives_with_its_tuples(value: Any) -> None:
    restored = decode_metadata(encode_metadata(value))
    assert restored == value
    assert repr(restored) == repr(value)
