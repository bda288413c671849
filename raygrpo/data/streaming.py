"""Prompts over a streamed dataset, which is too large to hold or to scan first.

The library's own shuffle buffer is not restored on resume. So rows are read in blocks, and each
block is shuffled as a whole. A cursor is the library's state at the start of a block, which a
resumed run reads again, and the number of rows drawn from the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any

import datasets
import numpy as np
import xxhash

from raygrpo.config import DataSection
from raygrpo.data.maker import PromptMaker
from raygrpo.data.prompts import STREAM_KEYS, changed_rows, nothing_fits, row_bytes
from raygrpo.errors import ConfigError, DataError
from raygrpo.types import GroupSummary, Prompt, Stream

BLOCK = 1000


class StreamingSource:
    """Prompts over an IterableDataset, made when they are drawn; `BLOCK` rows are shuffled at once.

    The order is a function of (seed, stream, epoch, block). An unusable row raises when it is met.
    Epochs are counted whole, since the number of rows is unknown.

    Raises:
        DataError: the dataset has no rows, or its first row cannot be used.
        ConfigError: ``max_pass_rate`` is set, which needs numbered rows.
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
        self._maker.token_ids([row], number)

    @property
    def num_dropped(self) -> int:
        """Rows met so far that were left out because their prompt is too long."""
        return self._maker.num_dropped

    @property
    def num_truncated(self) -> int:
        """Rows met so far whose prompt is too long and is cut on the left."""
        return self._maker.num_truncated

    @property
    def epoch(self) -> float:
        """Whole passes over the data so far."""
        return float(self._place["epoch"])

    def next(self) -> Prompt:
        """The next prompt; after the last row of an epoch, the first of a new one.

        Raises:
            DataError: a row cannot be read or used, or no prompt of an epoch fits.
        """
        began, prompt = self.epoch, None
        while prompt is None:
            while self._drawn == len(self._block):
                self._advance()
                if self.epoch > began + 1:
                    raise nothing_fits(self._section)
            number, row = self._block[self._drawn]
            prompt = self._maker.make(row, number)
            self._drawn += 1
        return prompt

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts in the source's own order; all of them if there are fewer.

        The train stream counts dropped rows when it draws them, so they are not counted here.
        """
        maker = copy(self._maker) if self._key[1] == STREAM_KEYS["train"] else self._maker
        made = (maker.make(row, number) for number, row in self._numbered(self._fresh(), 0))
        return list(islice((prompt for prompt in made if prompt is not None), num_prompts))

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Does nothing: a stream draws every row again."""

    def settle(self, last_group_id: int) -> None:
        """Does nothing: a stream draws every row again."""

    def metrics(self) -> dict[str, float]:
        """The rows met so far that were left out."""
        return {"data/num_dropped": float(self.num_dropped)}

    def state(self) -> dict[str, Any]:
        """The cursor for `restore`; plain data."""
        counts = {"num_dropped": self.num_dropped, "num_truncated": self.num_truncated}
        return {**self._place, **counts, "drawn": self._drawn, "checksum": self._checksum}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken; the current block is read again.

        Raises:
            DataError: the block has other rows now.
        """
        if "library" not in state:  # of a source that was not streamed
            raise changed_rows(self._section)
        self._begin({name: state[name] for name in self._place})
        if state["checksum"] != self._checksum:
            raise changed_rows(self._section)
        self._drawn = state["drawn"]
        self._maker.num_dropped = state["num_dropped"]
        self._maker.num_truncated = state["num_truncated"]

    def _advance(self) -> None:
        """The next block; after the last block of an epoch, the first block of a new epoch."""
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
