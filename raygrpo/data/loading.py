"""From the configuration to a stream of prompts."""

from __future__ import annotations

from typing import Any

import datasets
import xxhash

from raygrpo.config import DataSection
from raygrpo.data.mixture import Mixture, mixture_parts, naming
from raygrpo.data.prompts import PromptSource, PromptStream
from raygrpo.data.sources import eval_seed, load_rows
from raygrpo.data.streaming import StreamingSource
from raygrpo.types import Stream


def make_prompts(
    section: DataSection,
    tokenizer: Any,
    *,
    seed: int,
    stream: Stream = "train",
    dataset: datasets.Dataset | datasets.IterableDataset | None = None,
) -> PromptStream:
    """The prompts that a section describes; ``dataset`` takes the place of its own source.

    Raises:
        ConfigError: a source that does not exist, or keys that do not fit it or each other.
        DataError: a source that cannot be read, or a row that cannot be used.
    """
    parts = mixture_parts(section)
    # Rows that are made from a seed must not be those of training.
    rows_seed = eval_seed(seed) if stream == "eval" else seed
    if len(parts) == 1:
        rows = load_rows(section, seed=rows_seed, dataset=dataset)
        return _over(rows, section, tokenizer, seed, stream)
    opened: dict[str, PromptStream] = {}
    for part in parts:
        with naming(part.name):
            given = None if opened else dataset
            rows = load_rows(part.section, seed=rows_seed, dataset=given)
            # Parts of one size must not be shuffled alike.
            own_seed = xxhash.xxh3_64_intdigest(f"{seed}/{part.name}".encode())
            opened[part.name] = _over(rows, part.section, tokenizer, own_seed, stream)
    return Mixture(opened, [part.weight for part in parts], seed=seed, stream=stream)


def _over(
    rows: Any, section: DataSection, tokenizer: Any, seed: int, stream: Stream
) -> PromptStream:
    if isinstance(rows, datasets.IterableDataset):
        return StreamingSource(rows, section, tokenizer, seed=seed, stream=stream)
    return PromptSource(rows, section, tokenizer, seed=seed, stream=stream)
