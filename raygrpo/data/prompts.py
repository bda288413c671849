"""An endless, resumable stream of prompts: its protocol, and the stream over a dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import xxhash

from raygrpo.algorithm.correctness import pass_rate
from raygrpo.config import DataSection
from raygrpo.data.maker import PromptMaker
from raygrpo.data.pass_rate import Rows, SolvedRows
from raygrpo.errors import DataError
from raygrpo.types import GroupSummary, Prompt, Stream

_BATCH = 1000
STREAM_KEYS: Mapping[Stream, int] = {"train": 0, "eval": 1}


class PromptStream(Protocol):
    """Prompts, epoch after epoch; the order is a function of the seed and of `state`."""

    @property
    def num_dropped(self) -> int:
        """Rows left out so far because their prompt is too long."""

    @property
    def num_truncated(self) -> int:
        """Rows so far whose prompt is too long and is cut on the left."""

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def next(self) -> Prompt:
        """The next prompt; after the last prompt of an epoch, the first prompt of a new epoch."""

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts in the source's own order; all of them if there are fewer."""

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Takes decided training groups, dropped groups too, in order of admission."""

    def settle(self, last_group_id: int) -> None:
        """A step whose last group is this one was taken: groups observed up to it count."""

    def metrics(self) -> dict[str, float]:
        """Metrics of a step; ``data/num_restored`` counts since the last call."""

    def state(self) -> dict[str, Any]:
        """The cursor for `restore`; plain data."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            DataError: the state was taken over other rows.
        """


class PromptSource:
    """Prompts over a dataset; the order is a function of (seed, stream, epoch) and solved rows.

    The constructor renders and tokenises every row, so an unusable row is found before a model is
    loaded. A prompt's id names its row, such as ``row-17``.

    Attributes:
        num_dropped: rows left out because their prompt is too long.
        num_truncated: rows whose prompt is too long and is cut on the left.

    Raises:
        DataError: a column is missing, a row has no prompt, a prompt is too long (with ``overlong:
            error``), or no row is left.
        ConfigError: the template is malformed, or the tokenizer has no chat template.
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
        """Prompts of an epoch without solved rows."""
        return len(self._kept)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._index / len(self._order)

    def next(self) -> Prompt:
        """The next prompt; after the last prompt of an epoch, the first prompt of a new epoch."""
        if self._index == len(self._order):
            self._solved.begin_epoch(self._kept)
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        self._index += 1
        return self._prompt(int(self._order[self._index - 1]))

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts in the dataset's own order; all of them if there are fewer."""
        return [self._prompt(int(row)) for row in self._kept[:num_prompts]]

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Remembers groups whose pass rate is at or above ``max_pass_rate``."""
        for summary in summaries:
            row = int(summary.prompt_id.rpartition("-")[2])
            self._solved.observe(summary.group_id, row, pass_rate(summary))

    def settle(self, last_group_id: int) -> None:
        """Groups observed up to this id count from the next epoch on."""
        self._solved.settle(last_group_id)

    def metrics(self) -> dict[str, float]:
        """With ``max_pass_rate``: prompts that are not drawn again, and prompts that came back."""
        if self._section.max_pass_rate is None:
            return {}
        retired, restored = float(len(self._solved)), float(self._solved.num_restored)
        self._solved.num_restored = 0
        return {"data/num_retired": retired, "data/num_restored": restored}

    def state(self) -> dict[str, Any]:
        """The cursor for `restore`; plain integers."""
        cursor = {"epoch": self._epoch, "index": self._index, "checksum": self._checksum}
        return {**cursor, **self._solved.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            DataError: a row or a prompt has changed since the state was taken.
        """
        if state.get("checksum") != self._checksum:
            raise changed_rows(self._section)
        self._solved.restore(state)
        self._epoch, self._index = state["epoch"], state["index"]
        self._order = self._order_of(self._epoch)

    def _scan(self) -> tuple[Rows, int]:
        """The numbers of the rows that are used, and a checksum of all rows and token ids."""
        kept: list[int] = []
        digest = xxhash.xxh3_64()
        for start in range(0, len(self._rows), _BATCH):
            rows = list(self._rows.select(range(start, min(start + _BATCH, len(self._rows)))))
            prompts = zip(rows, self._maker.token_ids(rows, start), strict=True)
            for number, (row, ids) in enumerate(prompts, start):
                digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
                digest.update(row_bytes(row))
                if self._maker.fits(number, len(ids)):
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
        prompt = self._maker.make(self._rows[number], number)
        assert prompt is not None, "only rows that fit are drawn"
        return prompt


def row_bytes(row: Mapping[str, Any]) -> bytes:
    """A row's content as bytes for checksums; the order of columns does not matter."""
    return json.dumps(row, sort_keys=True, default=repr).encode()


def nothing_fits(section: DataSection) -> DataError:
    """The error of a source whose prompts are all too long."""
    limit = section.max_prompt_length
    return DataError(
        f"no prompt is within data.max_prompt_length ({limit})", "raise data.max_prompt_length"
    )


def changed_rows(section: DataSection) -> DataError:
    """The error of a cursor that was taken over other rows."""
    return DataError(
        f"the prompts of data.source {section.source!r} changed since the checkpoint",
        "restore the data to resume, or start again in another run_dir",
    )
