"""The rollout store's files: every finished group in Parquet, one row a completion.

``completions/step-00000003.parquet`` holds the groups that were decided for step 3, whose metrics
carry the same number: the groups that the step trained, and the groups that were dropped for it, in
order of admission. ``eval-00000003.parquet`` holds the groups of an evaluation. A file is written
under another name and then renamed, so a file under its own name is whole. `Row` is the one place
that names the columns; docs/rollouts.md says what they mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from raygrpo.errors import StorageError
from raygrpo.types import (
    BoolArray,
    Completion,
    Fate,
    Finish,
    FinishedGroup,
    FloatArray,
    Group,
    GroupRequest,
    IntArray,
    PlannedSample,
    Prompt,
    Sampling,
    Score,
    StepBatch,
    Stream,
    Version,
)

Kind = Literal["step", "eval"]
Minibatches = tuple[tuple[PlannedSample, ...], ...]

FORMAT = 1
_NUM_SAMPLED, _SHOWN_CHARACTERS = 8, 2000
_FACTS = b"raygrpo"
_TEMPORARY = ".tmp-"

Int32s = Sequence[int] | IntArray
Bools = Sequence[bool] | BoolArray
Floats = Sequence[float] | FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One part of a completion; the fields are the columns of a file.

    Example: the first completion of group 12, trained as the third sample of the only minibatch of
    step 4, is Row(step=4, group_id=12, completion_index=0, part=0, minibatch=0, position=2, ...).
    A sample is identified by (group_id, completion_index, part). The fields from ``minibatch`` on
    are None where no step trained the row.
    """

    step: int
    group_id: int
    completion_index: int
    part: int = 0
    attempt: int
    stream: Stream
    fate: str
    source: str
    prompt_id: str
    chat: bool
    prompt: str
    prompt_token_ids: Int32s
    completion: str
    token_ids: Int32s
    loss_mask: Bools
    sampler_logprobs: Floats
    finish: Finish
    version_incarnations: list[int]
    version_steps: list[int]
    version_counts: list[int]
    reward: float | None
    rewards: str
    error: str | None
    extras: str
    generate_s: float
    score_s: float
    minibatch: int | None = None
    position: int | None = None
    num_loss_tokens: int | None = None
    advantage: float | None = None
    loss_weight: float | None = None


# The column's type for each annotation of a field.
_ARROW = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
    "Stream": pa.string(),
    "Finish": pa.string(),
    "Int32s": pa.list_(pa.int32()),
    "Bools": pa.list_(pa.bool_()),
    "Floats": pa.list_(pa.float32()),
    "list[int]": pa.list_(pa.int64()),
}
SCHEMA = pa.schema(
    [(field.name, _ARROW[str(field.type).removesuffix(" | None")]) for field in fields(Row)]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a file says of itself. Example: FileFacts(step=3, complete=True, num_minibatches=1).

    A ``complete`` file lacks no finished group. ``num_minibatches`` is 0 while the step is open:
    then the file holds the dropped groups that a checkpoint counts as done, and gets the others
    when the step is trained.
    """

    step: int
    complete: bool
    num_minibatches: int = 0
    has_signal: bool = True
    num_groups: int = 0
    format: int = FORMAT


def file_path(directory: Path, kind: Kind, step: int) -> Path:
    """The path of a step's file, whether the file is there or not."""
    return directory / f"{kind}-{step:08}.parquet"


def files(directory: Path, kind: Kind) -> dict[int, Path]:
    """The files of a kind by step, in order."""
    paths = sorted(directory.glob(f"{kind}-{'[0-9]' * 8}.parquet"))
    return {int(path.stem.removeprefix(f"{kind}-")): path for path in paths}


def total_bytes(directory: Path) -> int:
    """Size of all files."""
    return sum(path.stat().st_size for path in directory.glob("*.parquet"))


def is_drawn(stream: Stream, group_id: int, frac: float) -> bool:
    """Whether a group is among the stored share: the same answer in every run."""
    return xxhash.xxh3_64_intdigest(f"{stream}/{group_id}".encode()) < frac * 2**64


def make_table(
    step: int,
    finished: Sequence[FinishedGroup],
    groups: Mapping[int, Group],
    minibatches: Minibatches,
) -> pa.Table:
    """The rows of ``finished``, by group id; a group without an entry in ``groups`` has none."""
    places = {
        (sample.group_id, sample.completion_index, sample.part): {
            "minibatch": index,
            "position": position,
            "num_loss_tokens": sample.num_loss_tokens,
            "advantage": sample.advantage,
            "loss_weight": sample.loss_weight,
        }
        for index, samples in enumerate(minibatches)
        for position, sample in enumerate(samples)
    }
    rows = [
        {name: _readable(getattr(row, name)) for name in SCHEMA.names}
        for item in sorted(finished, key=lambda item: item.summary.group_id)
        if (group := groups.get(item.summary.group_id)) is not None
        for row in _rows(step, item, group, places)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _rows(
    step: int,
    finished: FinishedGroup,
    group: Group,
    places: Mapping[tuple[int, int, int], dict[str, Any]],
) -> Iterator[Row]:
    summary, prompt = finished.summary, group.request.prompt
    messages = [dict(message) for message in prompt.messages or ()]
    for index, completion in enumerate(group.completions):
        score, place = summary.scores[index], places.get((summary.group_id, index, 0))
        versions = [version for version, _ in completion.version_runs]
        yield Row(
            step=step,
            group_id=summary.group_id,
            completion_index=index,
            attempt=group.request.attempt,
            stream=summary.stream,
            fate=_fate(finished.fate, score, trained=place is not None),
            source=summary.source,
            prompt_id=summary.prompt_id,
            chat=prompt.text is None,
            prompt=_json(messages) if prompt.text is None else prompt.text,
            prompt_token_ids=prompt.token_ids,
            completion=completion.text,
            token_ids=completion.token_ids,
            loss_mask=completion.loss_mask,
            sampler_logprobs=completion.logprobs,
            finish=completion.finish,
            version_incarnations=[version.incarnation for version in versions],
            version_steps=[version.step for version in versions],
            version_counts=[count for _, count in completion.version_runs],
            reward=score.value,
            rewards=_json(dict(score.parts)),
            error=score.error,
            extras=_json({name: column[index] for name, column in finished.extras.items()}),
            generate_s=group.generate_s,
            score_s=summary.score_s,
            **(place or {}),
        )


def _fate(of_group: Fate | None, score: Score, *, trained: bool) -> str:
    if of_group != "kept":
        return of_group or ""
    return "trained" if trained else "masked" if score.error is None else "errored"


def _readable(value: Any) -> Any:
    """A value whose text is valid UTF-8: a lone surrogate (half a character) is spelt out."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode()


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # keys that are no text; values in a circle
        return json.dumps(repr(value), ensure_ascii=False)


def write_file(path: Path, table: pa.Table, facts: FileFacts) -> None:
    """Writes rows.

    Groups that the file holds already stay in it, unless they come again. So a write may be
    repeated, and a step's file may be begun before the step is trained.

    Raises:
        StorageError: the file cannot be written, or the one that is there cannot be read.
    """
    if path.is_file():
        older, known = read_file(path)
        others = older.filter(pc.invert(pc.is_in(older["group_id"], table["group_id"])))
        order = [(name, "ascending") for name in ("group_id", "completion_index", "part")]
        table = pa.concat_tables([others, table]).sort_by(order)
        facts = replace(facts, complete=facts.complete and known.complete)
    _replace_file(path, table, facts)


def _replace_file(path: Path, table: pa.Table, facts: FileFacts) -> None:
    facts = replace(facts, num_groups=pc.count_distinct(table["group_id"]).as_py())
    table = table.replace_schema_metadata({_FACTS: json.dumps(asdict(facts))})
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        fix = "free some space, or lower max_gb in tracking.completions"
        raise StorageError(f"cannot write {path}: {error}", fix) from error


def read_facts(path: Path) -> FileFacts:
    """What a file says of itself; raises as `read_file`."""
    return read_file(path, columns=[])[1]


def read_file(path: Path, columns: list[str] | None = None) -> tuple[pa.Table, FileFacts]:
    """A file's rows, all columns unless named, and what it says of itself.

    Raises:
        StorageError: it cannot be read, or was written in another format.
    """
    try:
        table = pq.read_table(
            path, columns=columns, page_checksum_verification=True, partitioning=None
        )
        facts = json.loads((table.schema.metadata or {})[_FACTS])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise StorageError(f"{path} is no readable file of the store: {error}") from None
    if facts.get("format") != FORMAT:
        raise StorageError(f"{path} has format {facts.get('format')}, not {FORMAT}")
    return table.replace_schema_metadata(None), FileFacts(**facts)


def roll_back(directory: Path, step: int, is_decided: Callable[[int], bool]) -> None:
    """Takes the store back to a checkpoint of ``step``, from which the run goes on.

    Later files are removed, but not the groups in them that ``is_decided``: the checkpoint counts
    these as done, so the run does not make them again. What an unfinished write left is removed.

    Raises:
        StorageError: a file cannot be removed, read or written.
    """
    try:
        for leftover in directory.glob(f"{_TEMPORARY}*"):
            leftover.unlink()
        for number, path in files(directory, "eval").items():
            if number > step:
                path.unlink()
        for number, path in files(directory, "step").items():
            if number > step and not (number == step + 1 and _keep(path, is_decided)):
                path.unlink()
    except OSError as error:
        raise StorageError(f"cannot roll {directory} back to step {step}: {error}") from error


def _keep(path: Path, is_decided: Callable[[int], bool]) -> bool:
    """Cuts a file down to decided groups; False when it has none."""
    table, facts = read_file(path)
    decided = pa.array(list(map(is_decided, table["group_id"].to_pylist())), pa.bool_())
    kept = table.filter(decided)
    if len(kept):
        _replace_file(path, kept, replace(facts, num_minibatches=0))
    return len(kept) > 0


def sample_rows(table: pa.Table) -> list[dict[str, Any]]:
    """A few rows from all parts of a step, for trackers: each reward has its own column."""
    count = min(_NUM_SAMPLED, len(table))
    spread = [index * len(table) // count for index in range(count)]
    columns = ["rewards", "step", "prompt", "completion", "reward", "advantage"]
    rows = table.select(columns).take(pa.array(spread, pa.int64())).to_pylist()
    for row in rows:
        row |= {name: row[name][:_SHOWN_CHARACTERS] for name in ("prompt", "completion")}
    return [{**json.loads(row.pop("rewards")), **row} for row in rows]


def read_step(path: Path) -> StepBatch:
    """A step's plan as it was trained; the payloads are the groups themselves.

    Dataset columns, seeds and sampling settings are not stored, so the groups' requests lack them.

    Raises:
        StorageError: the file cannot be read.
    """
    table, facts = read_file(path)
    groups: dict[int, list[Row]] = {}
    for row in (Row(**columns) for columns in table.to_pylist()):
        groups.setdefault(row.group_id, []).append(row)
    samples: list[dict[int, PlannedSample]] = [{} for _ in range(facts.num_minibatches)]
    payloads: dict[int, Group] = {}
    for group_id, rows in groups.items():
        for row in rows:
            if row.minibatch is not None and row.position is not None:
                payloads[group_id] = payloads.get(group_id) or _group(rows)
                samples[row.minibatch][row.position] = _planned(row)
    return StepBatch(
        step=facts.step - 1,
        minibatches=tuple(
            tuple(batch[position] for position in sorted(batch)) for batch in samples
        ),
        payloads=payloads,
        versions={
            group_id: (
                min(completion.oldest for completion in group.completions),
                max(completion.newest for completion in group.completions),
            )
            for group_id, group in payloads.items()
        },
        has_signal=facts.has_signal,
    )


def _planned(row: Row) -> PlannedSample:
    assert row.num_loss_tokens is not None
    assert row.advantage is not None and row.loss_weight is not None
    return PlannedSample(
        group_id=row.group_id,
        completion_index=row.completion_index,
        part=row.part,
        prompt_length=len(row.prompt_token_ids),
        completion_length=len(row.token_ids),
        num_loss_tokens=row.num_loss_tokens,
        advantage=row.advantage,
        loss_weight=row.loss_weight,
    )


def _group(rows: Sequence[Row]) -> Group:
    first = rows[0]
    completions = tuple(_completion(row) for row in rows)
    prompt = Prompt(
        id=first.prompt_id,
        token_ids=np.array(first.prompt_token_ids, np.int32),
        text=None if first.chat else first.prompt,
        messages=tuple(json.loads(first.prompt)) if first.chat else None,
        source=first.source,
    )
    request = GroupRequest(
        stream=first.stream,
        group_id=first.group_id,
        attempt=first.attempt,
        prompt=prompt,
        seed=0,
        sampling=Sampling(
            num_completions=len(rows), max_tokens=max(len(row.token_ids) for row in rows)
        ),
        min_version=min(completion.oldest for completion in completions),
    )
    return Group(request=request, completions=completions, generate_s=first.generate_s)


def _completion(row: Row) -> Completion:
    versions = map(Version, row.version_incarnations, row.version_steps)
    return Completion(
        token_ids=np.array(row.token_ids, np.int32),
        logprobs=np.array(row.sampler_logprobs, np.float32),
        loss_mask=np.array(row.loss_mask, np.bool_),
        text=row.completion,
        finish=row.finish,
        version_runs=tuple(zip(versions, row.version_counts, strict=True)),
    )
