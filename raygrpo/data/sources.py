"""Where rows come from: the hub, a local file, a reasoning-gym task, or Python."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets

from raygrpo.config import DataSection, EvalDataSection, EvalSection
from raygrpo.config.sections import DataKeys
from raygrpo.errors import ConfigError, DataError, nearest

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
GYM = "reasoning_gym:"
GYM_SIZE = 1000
# Row i of a reasoning-gym task is drawn from seed + i: seeds closer together share rows.
_EVAL_SEED_OFFSET = 1_000_000_007
_TUPLE = "__tuple__"
K = TypeVar("K", bound=DataKeys)


def load_rows(
    section: DataSection,
    *,
    seed: int,
    dataset: datasets.Dataset | datasets.IterableDataset | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of ``section.source``, or ``dataset`` itself if it is given.

    Columns have the source's own names; `columns.renamed` renames them. With ``streaming`` in
    ``section.params`` the rows are an IterableDataset. A reasoning-gym task has the columns
    question, answer and metadata (`decode_metadata` reads metadata). Without ``size`` and ``seed``
    in ``section.params`` it has 1000 rows drawn from ``seed``.

    Raises:
        ConfigError: the source does not exist, or its arguments do not fit it.
        DataError: the source holds nothing readable, or no rows.
    """
    if dataset is None:
        if section.source.startswith(GYM):
            dataset = _load_gym(section, seed)
        elif _is_file(section.source):
            dataset = _load_file(section)
        else:
            dataset = _load_hub(section)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    if not isinstance(dataset, datasets.Dataset):
        raise ConfigError(
            f"the dataset is a {type(dataset).__name__}, not a datasets.Dataset",
            "pass one split of it, such as dataset['train']",
        )
    if not len(dataset):
        raise DataError(f"data.source {section.source!r} has no rows", "name a dataset with rows")
    return dataset


def eval_section(data: DataSection, evaluation: EvalSection, *, seed: int) -> DataSection:
    """What the evaluation reads: ``data`` with the keys that ``evaluation.data`` sets.

    The parts of ``data`` and its max_pass_rate are training's alone. A hub data set is read from
    split test unless ``evaluation.data`` names one. The same reasoning-gym task gets other rows:
    unless ``evaluation.data`` names a seed, the training seed is moved (`eval_seed`).
    """
    changes = evaluation.data
    source = changes.source or data.source
    params: dict[str, Any] = {}
    if not source.startswith(GYM):
        params = {} if _is_file(source) else {"split": "test"}
    elif source == data.source:
        params = {"seed": eval_seed(data.params.get("seed", seed))}
    changes = changes.model_copy(update={"params": {**params, **changes.params}})
    alone = data.model_copy(update={"mixture": [], "max_pass_rate": None})
    return alone.changed(changes)


def split_of(section: DataSection) -> str:
    """The split of a hub data set."""
    return str(section.params.get("split", "train"))


def _is_file(source: str) -> bool:
    return Path(source).suffix in BUILDERS


def is_on_hub(source: str) -> bool:
    """Whether a source is a data set of the hub, judged by its name."""
    elsewhere = source.startswith(GYM) or Path(source).suffix in BUILDERS or Path(source).exists()
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
    return named is not None and not elsewhere and source not in ("python", *BUILDERS.values())


def anchored_source(keys: K) -> K:
    """The same keys with the paths of files made absolute, those of a mixture's parts too."""
    changes: dict[str, Any] = {}
    path = Path(keys.source).expanduser()
    if _is_file(keys.source) and path.is_file():
        changes["source"] = str(path.absolute())
    if isinstance(keys, DataSection | EvalDataSection) and keys.mixture:
        changes["mixture"] = [anchored_source(part) for part in keys.mixture]
    return keys.model_copy(update=changes) if changes else keys


def eval_seed(seed: int) -> int:
    """The training seed, moved so far that no training row has one of its rows' seeds."""
    return seed + _EVAL_SEED_OFFSET


def _load_file(section: DataSection) -> Any:
    path = Path(section.source).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"data.source: there is no file {section.source!r}",
            f"check the path; the working directory is {Path.cwd()}",
        )
    if not path.stat().st_size:
        raise DataError(f"data.source {section.source!r} is an empty file", "write rows into it")
    builder, files = BUILDERS[path.suffix], str(path.absolute())
    try:
        with _reading(section.source):
            return datasets.load_dataset(builder, data_files=files, split="train", **section.params)
    except TypeError as error:
        raise ConfigError(
            f"data.params of {section.source!r}: {error}",
            f"give arguments of datasets.load_dataset({builder!r}, ...)",
        ) from error
    except ValueError as error:
        raise DataError(
            f"data.source {section.source!r} has no rows: {error}", "write rows into it"
        ) from error


def _load_hub(section: DataSection) -> Any:
    try:
        with _reading(section.source):
            return datasets.load_dataset(section.source, **{"split": "train", **section.params})
    except (ValueError, TypeError) as error:  # an unknown split, name, revision or argument
        raise ConfigError(f"data.source {section.source!r}: {error}", "set data.params") from error


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    """Hides progress bars; turns the library's errors into ours."""
    bars = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise ConfigError(
            f"data.source {source!r} was found neither here nor on the hub: {error}",
            f"name a hub dataset, a local {'/'.join(BUILDERS)} file, or {GYM}<task>",
        ) from error
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        reason = error.__cause__ or error
        raise DataError(f"data.source {source!r} cannot be read: {reason}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _load_gym(section: DataSection, seed: int) -> datasets.Dataset:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = section.source.removeprefix(GYM)
    if task not in DATASETS:
        raise ConfigError(f"reasoning-gym has no task {task!r}", nearest(task, DATASETS))
    params = {"size": GYM_SIZE, "seed": seed, **section.params}
    known = inspect.signature(DATASETS[task][1]).parameters
    if unknown := [name for name in params if name not in known]:
        raise ConfigError(
            f"data.params: {task} has no parameter {unknown[0]!r}", nearest(unknown[0], known)
        )
    try:
        items = reasoning_gym.create_dataset(task, **params)
        rows = [items[index] for index in range(len(items))]
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"data.params of {task}: {error}", "correct the parameters") from error
    columns = {name: [row[name] for row in rows] for name in ("question", "answer")}
    columns["metadata"] = [encode_metadata(row["metadata"]) for row in rows]
    return datasets.Dataset.from_dict(columns)


def encode_metadata(metadata: Any) -> str:
    """Metadata as JSON that tells tuples from lists, since arc_agi and rearc compare them."""
    return json.dumps(_tag(metadata))


def decode_metadata(text: str) -> Any:
    """The metadata that `encode_metadata` was given; keys of mappings are text."""

    def restore(found: dict[str, Any]) -> Any:
        return tuple(found[_TUPLE]) if found.keys() == {_TUPLE} else found

    return json.loads(text, object_hook=restore)


def _tag(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_tag(item) for item in value]}
    if isinstance(value, list):
        return [_tag(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _tag(item) for name, item in value.items()}
    return value
