"""An endless, resumable stream of prompts: what every kind offers, and the one over a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import xxhash

from raygrpo.algorithm.correctness import pass_rate
from raygrpo.config import DataSection
from raygrpo.data.maker import PromptMaker, changed_rows, nothing_fits, row_bytes
from raygrpo.data.pass_rate import Rows, SolvedRows
from raygrpo.types import GroupSummary, Prompt, Stream

_BATCH = 1000
STREAM_KEYS: Mapping[Stream, int] = {"train": 0, "eval": 1}


class PromptStream(Protocol):
    """Prompts, epoch after epoch, in an order that is a function of the seed and of `state`.

    Attributes:
        num_dropped: rows left out so far because their prompt is too long.
        num_truncated: rows so far whose prompt was too long and is cut on the left.
    """

    @property
    def num_dropped(self) -> int: ...

    @property
    def num_truncated(self) -> int: ...

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def next(self) -> Prompt:
        """The next prompt; after the last one of an epoch, the first of a new one."""

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts in the source's own order; all where there are fewer."""

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Takes training groups whose fate is decided, in order of admission, dropped ones too."""

    def settle(self, last_group_id: int) -> None:
        """A step was taken whose last group is this one: what was observed up to it counts."""

    def metrics(self) -> dict[str, float]:
        """What to log with a step; ``data/num_restored`` counts since the last call."""

    def state(self) -> dict[str, Any]:
        """The cursor, to be given to `restore`; plain data."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            DataError: the rows are not those that the state was taken over.
        """


class PromptSource:
    """Prompts over a dataset; the order depends on (seed, stream, epoch) and the solved rows alone.

    Every row is rendered and tokenised once at construction, so that a row that cannot be used is
    found before a model is loaded. A prompt's id names its row.

    Attributes:
        num_dropped: rows left out because their prompt is too long.
        num_truncated: rows whose prompt was too long and is cut on the left.

    Raises:
        DataError: a missing column, a row without a prompt, one that is too long (with ``overlong:
            error``), or no row left.
        ConfigError: a template that is malformed, or a chat without a chat template.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        section: DataSection,
        tokenizer: Any,
        *,
        seed: int,
        stream: Stream = "train",
    ) -> None:
        self._rows, self._section = rows, section
        self._maker = PromptMaker(section, rows.column_names, tokenizer)
        self._key = (seed, STREAM_KEYS[stream])
        self._kept, self._checksum = self._scan()
        self.num_dropped, self.num_truncated = self._maker.num_dropped, self._maker.num_truncated
        self._solved = SolvedRows(section.max_pass_rate)
        self._epoch, self._index = 0, 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Prompts in one epoch when none is solved."""
        return len(self._kept)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._index / len(self._order)

    def next(self) -> Prompt:
        """The next prompt; after the last one of an epoch, the first of a new one."""
        if self._index == len(self._order):
            self._solved.begin_epoch(self._kept)
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        self._index += 1
        return self._prompt(int(self._order[self._index - 1]))

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts of the dataset in its own order; all where there are fewer."""
        return [self._prompt(int(row)) for row in self._kept[:num_prompts]]

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Remembers groups whose pass rate is at or above ``max_pass_rate``."""
        for summary in summaries:
            row = int(summary.prompt_id.rpartition("-")[2])
            self._solved.observe(summary.group_id, row, pass_rate(summary))

    def settle(self, last_group_id: int) -> None:
        """What was observed up to this group counts from the next epoch on."""
        self._solved.settle(last_group_id)

    def metrics(self) -> dict[str, float]:
        """With ``max_pass_rate``: prompts that are not drawn again, and those that came back."""
        if self._section.max_pass_rate is None:
            return {}
        retired, restored = float(len(self._solved)), float(self._solved.num_restored)
        self._solved.num_restored = 0
        return {"data/num_retired": retired, "data/num_restored": restored}

    def state(self) -> dict[str, Any]:
        """The cursor, to be given to `restore`; plain integers."""
        cursor = {"epoch": self._epoch, "index": self._index, "checksum": self._checksum}
        return {**cursor, **self._solved.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            DataError: a row or a prompt is not what it was when the state was taken.
        """
        if state.get("checksum") != self._checksum:
            raise changed_rows(self._section)
        self._solved.restore(state)
        self._epoch, self._index = state["epoch"], state["index"]
        self._order = self._order_of(self._epoch)

    def _scan(self) -> tuple[Rows, int]:
        """Row numbers that stay, and a checksum over every row and every prompt's token ids."""
        kept: list[int] = []
        digest = xxhash.xxh3_64()
        for start in range(0, len(self._rows), _BATCH):
            numbers = range(start, min(start + _BATCH, len(self._rows)))
            rows = [self._rows[number] for number in numbers]
            names = [f"row {number}" for number in numbers]
            prompts = zip(numbers, names, rows, self._maker.tokenize(rows, names), strict=True)
            for number, name, row, ids in prompts:
                digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
                digest.update(row_bytes(row))
                if self._maker.fits(name, len(ids)):
                    kept.append(number)
        if not kept:
            raise nothing_fits(self._section)
        # 63 bits: what every JSON and msgpack reader takes as an integer.
        return np.array(kept, dtype=np.int64), digest.intdigest() >> 1

    def _order_of(self, epoch: int) -> Rows:
        order = self._kept
        if self._section.shuffle:
            order = np.random.default_rng((*self._key, epoch)).permutation(order)
        return self._solved.left_of(order)

    def _prompt(self, number: int) -> Prompt:
        prompt = self._maker.make(self._rows[number], f"row-{number}", f"row {number}")
        assert prompt is not None, "only rows that fit are drawn"
        return prompt
