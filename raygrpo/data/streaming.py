"""Prompts over a dataset that is read as it goes, too large to hold or to scan first.

The library's own shuffle buffer is not restored on resume. So rows are read in blocks, and a block
is shuffled as a whole: a cursor is the library's state at the start of the block (which is read
again on resume), and how many of the block's rows were drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import numpy as np
import xxhash

from raygrpo.config import DataSection
from raygrpo.data.maker import PromptMaker, changed_rows, nothing_fits, row_bytes
from raygrpo.data.prompts import STREAM_KEYS
from raygrpo.errors import ConfigError, DataError
from raygrpo.types import GroupSummary, Prompt, Stream

BLOCK = 1000
_COUNTS = ("num_dropped", "num_truncated")


class StreamingSource:
    """Prompts over an IterableDataset, made when they are drawn; each `BLOCK` rows are shuffled.

    The order depends on (seed, stream, epoch, block) alone. A row that cannot be used is found when
    it is met. Epochs are counted whole: the number of rows is not known.

    Raises:
        DataError: nothing can be read, or the first row cannot be used.
        ConfigError: ``max_pass_rate``, which needs rows that are numbered.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        section: DataSection,
        tokenizer: Any,
        *,
        seed: int,
        stream: Stream = "train",
    ) -> None:
        if section.max_pass_rate is not None:
            raise ConfigError(
                f"data.max_pass_rate: {section.source!r} is streamed, and which of its rows were "
                "solved is not remembered",
                "set it to null (in a mixture: for this part), or load the source whole",
            )
        self._rows, self._section = rows, section
        self._key = (seed, STREAM_KEYS[stream])
        self._begin({"epoch": 0, "block": 0, "row": 0, "library": None})
        if not self._block:
            raise DataError(f"data.source {section.source!r} has no rows", "name one with rows")
        number, row = min(self._block, key=lambda numbered: numbered[0])
        self._maker = PromptMaker(section, list(row), tokenizer)
        self._maker.tokenize([row], [f"row {number}"])

    @property
    def num_dropped(self) -> int:
        """Rows met so far and left out because their prompt is too long."""
        return self._maker.num_dropped

    @property
    def num_truncated(self) -> int:
        """Rows met so far whose prompt was too long and is cut on the left."""
        return self._maker.num_truncated

    @property
    def epoch(self) -> float:
        """Whole passes over the data so far."""
        return float(self._place["epoch"])

    def next(self) -> Prompt:
        """The next prompt; after the last row of an epoch, the first of a new one.

        Raises:
            DataError: a row that cannot be used or read, or an epoch without a prompt that fits.
        """
        began, prompt = self.epoch, None
        while prompt is None:
            while self._drawn == len(self._block):
                self._advance()
                if self.epoch > began + 1:
                    raise nothing_fits(self._section)
            prompt = self._make(*self._block[self._drawn])
            self._drawn += 1
        return prompt

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts in the source's own order; all where there are fewer.

        Rows left out on the way count where nothing is drawn: a drawn stream meets them itself.
        """
        counts = {name: getattr(self._maker, name) for name in _COUNTS}
        made = (self._make(number, row) for number, row in self._numbered(self._fresh(), 0))
        prompts = list(islice((prompt for prompt in made if prompt is not None), num_prompts))
        if self._key[1] == STREAM_KEYS["train"]:
            for name, count in counts.items():
                setattr(self._maker, name, count)
        return prompts

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Nothing: a stream draws every row again."""

    def settle(self, last_group_id: int) -> None:
        """Nothing: a stream draws every row again."""

    def metrics(self) -> dict[str, float]:
        """The rows met so far and left out."""
        return {"data/num_dropped": float(self.num_dropped)}

    def state(self) -> dict[str, Any]:
        """The cursor, to be given to `restore`; plain data."""
        counts = {name: getattr(self._maker, name) for name in _COUNTS}
        return {**self._place, **counts, "drawn": self._drawn, "checksum": self._checksum}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken: reads the block again that was being drawn.

        Raises:
            DataError: the block's rows are not what they were.
        """
        streamed = "library" in state
        if streamed:
            self._begin({name: state[name] for name in self._place})
        if not streamed or state["checksum"] != self._checksum:
            raise changed_rows(self._section)
        self._drawn = state["drawn"]
        for name in _COUNTS:
            setattr(self._maker, name, state[name])

    def _advance(self) -> None:
        """The next block; where the epoch has ended, the first of a new one."""
        epoch, block, row = (self._place[name] for name in ("epoch", "block", "row"))
        row, library = row + len(self._block), self._current.state_dict()
        self._read_block({"epoch": epoch, "block": block + 1, "row": row, "library": library})
        if not self._block:
            self._begin({"epoch": epoch + 1, "block": 0, "row": 0, "library": None})

    def _begin(self, place: dict[str, Any]) -> None:
        self._current = self._fresh()
        if place["library"] is not None:
            self._current.load_state_dict(place["library"])
        self._ahead = self._numbered(self._current, place["row"])
        self._read_block(place)

    def _read_block(self, place: dict[str, Any]) -> None:
        block = list(islice(self._ahead, BLOCK))
        digest = xxhash.xxh3_64()
        for _, row in block:
            digest.update(row_bytes(row))
        if self._section.shuffle:
            generator = np.random.default_rng((*self._key, place["epoch"], place["block"]))
            block = [block[index] for index in generator.permutation(len(block))]
        self._place, self._block, self._drawn = place, block, 0
        self._checksum: int = digest.intdigest() >> 1

    def _fresh(self) -> datasets.IterableDataset:
        # An object of its own: the library keeps the state of an iteration in the dataset.
        return self._rows.shard(num_shards=1, index=0)

    def _numbered(
        self, rows: Iterable[dict[str, Any]], number: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            for row in rows:
                yield number, row
                number += 1
        except (OSError, ValueError) as error:  # pyarrow's and the library's are ValueErrors
            raise DataError(
                f"data.source {self._section.source!r} cannot be read from row {number} on: {error}"
            ) from error

    def _make(self, number: int, row: Mapping[str, Any]) -> Prompt | None:
        return self._maker.make(row, f"row-{number}", f"row {number}")
