"""The rollout store's files, and which stores may be replayed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.commands.replay import stored_steps
from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.rollouts import (
    SCHEMA,
    FileFacts,
    file_path,
    files,
    is_drawn,
    make_table,
    read_facts,
    read_file,
    read_step,
    roll_back,
    sample_rows,
    write_file,
)
from raygrpo.storage.run_dir import RunDir
from raygrpo.types import (
    Completion,
    Fate,
    FinishedGroup,
    Group,
    PlannedSample,
    Prompt,
    Score,
    Version,
)
from tests import builders

_FLOATS = st.floats(width=32, allow_nan=False)
_REALS = st.floats(allow_nan=False, allow_infinity=False)
# Any text that Python can hold, lone surrogates included.
_TEXT = st.text(st.characters(codec=None), max_size=8)


@st.composite
def completions(draw: Any) -> Completion:
    length = draw(st.integers(1, 5))
    tokens = st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)
    logprobs = st.lists(_FLOATS, min_size=length, max_size=length)
    mask = st.lists(st.booleans(), min_size=length, max_size=length)
    head = draw(st.integers(0, length))
    runs = ((Version(1, 3), head), (Version(2, 4), length - head))
    return Completion(
        token_ids=np.array(draw(tokens), np.int32),
        logprobs=np.array(draw(logprobs), np.float32),
        loss_mask=np.array(draw(mask), np.bool_),
        text=draw(_TEXT),
        finish=draw(st.sampled_from(["stop", "length", "abort"])),
        version_runs=tuple(run for run in runs if run[1]),
    )


@st.composite
def steps(draw: Any) -> tuple[list[FinishedGroup], dict[int, Group], Any]:
    """Groups of a step, kept and dropped, and a plan of some of the kept ones' completions."""
    stored, groups, planned = [], {}, []
    for group_id in draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True)):
        members = draw(st.lists(completions(), min_size=1, max_size=3))
        chat = draw(st.booleans())
        prompt = Prompt(
            id=draw(_TEXT),
            token_ids=np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)), np.int32),
            text=None if chat else draw(_TEXT),
            messages=({"role": "user", "content": draw(_TEXT)},) if chat else None,
        )
        order = builders.request(group_id, num_completions=len(members))
        groups[group_id] = builders.group(replace(order, prompt=prompt), members)
        values = draw(st.lists(_REALS, min_size=len(members), max_size=len(members)))
        fate = draw(st.sampled_from(["kept", "no_signal"]))
        stored.append(
            FinishedGroup(
                summary=builders.summary(group_id, values),
                payload=None,
                teaches=True,
                fate=fate,
                extras={"note": tuple(draw(_TEXT) for _ in members)},
            )
        )
        for index, member in enumerate(members):
            if fate == "kept" and draw(st.booleans()):
                planned.append(
                    PlannedSample(
                        group_id=group_id,
                        completion_index=index,
                        prompt_length=prompt.token_ids.size,
                        completion_length=member.token_ids.size,
                        num_loss_tokens=int(member.loss_mask.sum()),
                        advantage=draw(_REALS),
                        loss_weight=draw(_REALS),
                    )
                )
    cut = draw(st.integers(0, len(planned)))
    planned = draw(st.permutations(planned))
    return stored, groups, (tuple(planned[:cut]), tuple(planned[cut:]))


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_a_step_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, step: Any) -> None:
    stored, groups, minibatches = step
    path = tmp_path_factory.mktemp("store") / "step-00000007.parquet"
    facts = FileFacts(step=7, complete=True, num_minibatches=2, has_signal=False)
    write_file(path, make_table(7, stored, groups, minibatches), facts)
    assert read_facts(path) == replace(facts, num_groups=len(groups))
    batch = read_step(path)
    assert (batch.step, batch.has_signal) == (6, False)
    assert batch.minibatches == minibatches, "float64: equal to the last bit, in the same order"
    assert set(batch.payloads) == {sample.group_id for part in minibatches for sample in part}
    for group_id, group in batch.payloads.items():
        original = groups[group_id]
        prompt, expected = group.request.prompt, original.request.prompt
        assert prompt.token_ids.tolist() == expected.token_ids.tolist()
        for ours, theirs in zip(group.completions, original.completions, strict=True):
            assert ours.version_runs == theirs.version_runs
            for name in ("token_ids", "logprobs", "loss_mask"):
                mine, other = getattr(ours, name), getattr(theirs, name)
                assert mine.dtype == other.dtype
                assert mine.tobytes() == other.tobytes()
    # Whatever the texts hold, other readers can read them.
    frame = pandas.read_parquet(path)
    assert len(frame) == sum(len(group.completions) for group in groups.values())
    assert frame.group_id.is_monotonic_increasing
    assert all(json.loads(text).keys() == {"note"} for text in frame.extras)
    frame.completion.str.encode("utf-8")


def group(group_id: int, num_completions: int = 2) -> Group:
    done = [builders.completion([group_id, index, 7]) for index in range(num_completions)]
    return builders.group(builders.request(group_id, num_completions=num_completions), done)


def stored(group_id: int, fate: Fate = "kept", rewards: Any = (0.0, 1.0)) -> FinishedGroup:
    return replace(builders.finished(group_id, rewards), fate=fate)


def write(directory: Path, step: int, fates: dict[int, Fate], **facts: Any) -> Path:
    """A step's file: the groups by fate; with ``kept`` ones it is a trained step's."""
    path = file_path(directory, "step", step)
    groups = [stored(group_id, fate) for group_id, fate in fates.items()]
    plan = [sample(i) for i, fate in fates.items() if fate == "kept"]
    table = make_table(step, groups, {i: group(i) for i in fates}, (tuple(plan),) if plan else ())
    known = {"complete": True, "num_minibatches": int(bool(plan)), **facts}
    write_file(path, table, FileFacts(step=step, **known))
    return path


def sample(group_id: int, index: int = 0) -> PlannedSample:
    return PlannedSample(
        group_id=group_id,
        completion_index=index,
        prompt_length=3,
        completion_length=3,
        num_loss_tokens=3,
        advantage=0.5,
        loss_weight=0.25,
    )


def test_rows_say_what_became_of_each_completion(tmp_path: Path) -> None:
    half_scored = builders.summary(5, [1.0, "it broke", None, 2.0])
    half_scored = replace(half_scored, source="sums", score_s=0.5)
    score = Score(value=3.0, parts={"a": 1.0, "b": None})
    half_scored = replace(half_scored, scores=(score, *half_scored.scores[1:]))
    groups = [
        replace(stored(5), summary=half_scored, extras={"seen": ({"é": 1}, None, {1}, "")}),
        stored(3, "no_signal"),
        stored(4, "errored"),
    ]
    payloads = {3: group(3), 4: group(4), 5: group(5, 4)}
    table = make_table(2, groups, payloads, ((), (sample(5, 3), sample(5, 0))))
    frame = table.to_pandas()
    assert frame.group_id.tolist() == [3, 3, 4, 4, 5, 5, 5, 5]
    assert frame.completion_index.tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    fates = ["no_signal"] * 2 + ["errored"] * 2 + ["trained", "errored", "masked", "trained"]
    assert frame.fate.tolist() == fates
    trained = frame[frame.fate == "trained"]
    assert trained.minibatch.tolist() == [1, 1]
    assert trained.position.tolist() == [1, 0]
    assert trained.loss_weight.tolist() == [0.25, 0.25]
    assert frame[frame.fate != "trained"].advantage.isna().all()
    assert json.loads(frame.rewards[4]) == {"a": 1.0, "b": None}
    assert frame.reward[4] == 3.0
    assert frame.error[5] == "it broke"
    assert np.isnan(frame.reward[5])
    assert json.loads(frame.extras[4]) == {"seen": {"é": 1}}
    assert json.loads(frame.extras[6]) == {"seen": "{1}"}, "what JSON cannot hold is text"
    assert frame.source[4] == "sums"
    assert frame.score_s[4] == 0.5
    assert frame.token_ids[7].tolist() == [5, 3, 7]


def test_a_group_whose_tokens_are_lost_has_no_rows() -> None:
    table = make_table(1, [stored(1), stored(2)], {2: group(2)}, ())
    assert table["group_id"].to_pylist() == [2, 2]


def test_keys_that_json_cannot_hold_are_kept_as_text() -> None:
    item = replace(stored(1), extras={"seen": ({(1, 2): 3}, {(1, 2): 3})})
    (first, _) = make_table(1, [item], {1: group(1)}, ())["extras"].to_pylist()
    assert "(1, 2)" in json.loads(first)


def test_a_write_may_come_in_parts_and_be_repeated(tmp_path: Path) -> None:
    write(tmp_path, 2, {4: "no_signal", 6: "no_signal"})
    assert not read_facts(file_path(tmp_path, "step", 2)).num_minibatches, "still open"
    whole = {5: "kept", 7: "kept"}
    path = write(tmp_path, 2, whole)
    table, facts = read_file(path)
    assert table["group_id"].to_pylist() == [4, 4, 5, 5, 6, 6, 7, 7]
    assert facts == FileFacts(step=2, complete=True, num_minibatches=1, num_groups=4)
    write(tmp_path, 2, whole)
    assert read_file(path)[0].equals(table)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_part_that_lacks_groups_makes_the_file_incomplete(tmp_path: Path) -> None:
    write(tmp_path, 2, {4: "no_signal"}, complete=False)
    assert not read_facts(write(tmp_path, 2, {5: "kept"})).complete


def test_rolling_back_keeps_what_the_checkpoint_counts_as_done(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        first = 3 * step
        write(tmp_path, step, {first: "kept", first + 1: "no_signal", first + 2: "kept"})
    kept = file_path(tmp_path, "step", 1).read_bytes()
    for step in (0, 1, 2):
        groups = {0: group(0)}
        table = make_table(step, [stored(0, "eval")], groups, ())
        write_file(file_path(tmp_path, "eval", step), table, FileFacts(step=step, complete=True))
    (tmp_path / ".tmp-step-00000003.parquet").write_text("half")
    # The checkpoint of step 1 was left when group 7 had been dropped for step 2.
    roll_back(tmp_path, 1, lambda group_id: group_id in (3, 4, 5, 7))
    names = [f"{name}.parquet" for name in ("eval-00000000", "eval-00000001", "step-00000001")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "step-00000002.parquet"]
    assert file_path(tmp_path, "step", 1).read_bytes() == kept
    table, facts = read_file(file_path(tmp_path, "step", 2))
    assert table["group_id"].to_pylist() == [7, 7]
    assert facts == FileFacts(step=2, complete=True, num_minibatches=0, num_groups=1)
    roll_back(tmp_path, 1, lambda group_id: group_id in (3, 4, 5))
    assert list(files(tmp_path, "step")) == [1]
    roll_back(tmp_path, -1, lambda _: False)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1, {0: "kept"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="step-00000001"):
        read_facts(path)
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    with pytest.raises(StorageError, match="step-00000001"):
        read_step(path)
    pq.write_table(make_table(1, [], {}, ()), path)
    with pytest.raises(StorageError, match="no readable file of the store"):
        read_step(path)
    path.write_bytes(whole)
    read_step(path)


def test_draws_are_fixed_shares() -> None:
    ids = range(20_000)
    quarter = [i for i in ids if is_drawn("train", i, 0.25)]
    half = {i for i in ids if is_drawn("train", i, 0.5)}
    # Binomial: the standard deviation of the share is 0.003.
    assert len(quarter) / len(ids) == pytest.approx(0.25, abs=0.015)
    assert half > set(quarter), "a larger share holds the smaller one"
    assert quarter[:6] == [0, 3, 7, 8, 21, 26], "in every process and version"
    assert all(is_drawn("eval", i, 1.0) and not is_drawn("eval", i, 0.0) for i in range(1000))


def test_samples_are_short_and_from_all_over() -> None:
    groups = {i: group(i) for i in range(40)}
    long = replace(groups[0].completions[0], text="x" * 5000)
    groups[0] = replace(groups[0], completions=(long, groups[0].completions[1]))
    rows = sample_rows(make_table(3, [stored(i) for i in groups], groups, ((sample(0),),)))
    assert len(rows) == 8
    assert list(rows[0]) == ["r", "step", "prompt", "completion", "reward", "advantage"]
    assert rows[0]["completion"] == "x" * 2000
    assert (rows[0]["advantage"], rows[1]["advantage"]) == (0.5, None)
    assert len(sample_rows(make_table(3, [stored(1)], {1: group(1)}, ()))) == 2
    assert sample_rows(make_table(3, [], {}, ())) == []


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of three trained steps, with a group dropped for the fourth."""
    run_dir = RunDir(tmp_path)
    for step in (1, 2, 3):
        write(run_dir.completions, step, {step: "kept"})
    write(run_dir.completions, 4, {4: "no_signal"})
    lines = (json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    run_dir.metrics_path.write_text("".join(lines))
    return run_dir


def test_a_whole_store_is_replayed_to_its_last_trained_step(run: RunDir) -> None:
    paths = list(files(run.completions, "step").values())
    assert stored_steps(run, None) == paths[:3]
    assert stored_steps(run, 2) == paths[:2]


def test_holes_are_named_and_refused(run: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"step-00000004.*missing"):
        stored_steps(run, 5)
    file_path(run.completions, "step", 2).unlink()
    with pytest.raises(ConfigError, match=r"step-00000002.*missing"):
        stored_steps(run, None)
    assert len(stored_steps(run, 1)) == 1, "what comes before the hole is whole"


def test_a_sampled_store_is_refused(run: RunDir) -> None:
    write(run.completions, 3, {9: "kept"}, complete=False)
    with pytest.raises(ConfigError, match=r"step-00000003.*lacks groups"):
        stored_steps(run, None)


@pytest.mark.parametrize("told_by", ["metrics", "checkpoint"])
def test_a_store_that_ends_before_the_run_is_refused(run: RunDir, told_by: str) -> None:
    if told_by == "metrics":
        with run.metrics_path.open("a") as file:
            file.write(json.dumps({"step": 4}) + "\n")
    else:
        (run.checkpoints / "step-00000006").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"step-00000004.*missing"):
        stored_steps(run, None)


def test_another_format_is_refused(run: RunDir) -> None:
    path = file_path(run.completions, "step", 1)
    table = pq.read_table(path, partitioning=None)
    facts = {**json.loads(table.schema.metadata[b"raygrpo"]), "format": 2}
    pq.write_table(table.replace_schema_metadata({b"raygrpo": json.dumps(facts)}), path)
    with pytest.raises(ConfigError, match="has format 2"):
        stored_steps(run, None)


def test_a_run_without_steps_has_nothing_to_replay(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no step"):
        stored_steps(RunDir(tmp_path), None)


def test_the_writer_does_without_torch() -> None:
    code = "import raygrpo.actors.rollout_writer, sys; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "pyarrow" in modules and "torch" not in modules


def test_the_documents_name_every_column() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
    tables = {
        name for line in text.splitlines() if line.startswith("| `") for name in line.split("`")
    }
    assert set(SCHEMA.names) <= tables
