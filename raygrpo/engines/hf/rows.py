"""The completions being decoded, as a table of numpy columns; the first rows are in use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raygrpo.engines.randomness import KeyArray
from raygrpo.types import Completion, Finish, GroupRequest, Version

Indices = npt.NDArray[np.int64]
Runs = tuple[tuple[Version, int], ...]


class RowTable:
    """Columns [rows] and token histories [rows, positions] of the running completions.

    A history holds the prompt and then the completion. Past its end it repeats an id of the prompt,
    so that the whole history can be read as a set of seen ids. ``slot`` is the place of the prompt
    that a row shares with its group, -1 if the row has its own. Keys and values before ``base`` lie
    in the slot.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.group = np.zeros(0, np.int64)
        self.completion = np.zeros(0, np.int64)
        self.setting = np.zeros(0, np.int64)
        self.keys: KeyArray = np.zeros(0, np.uint64)
        self.prompt_length = np.zeros(0, np.int64)
        self.length = np.zeros(0, np.int64)
        self.min_length = np.zeros(0, np.int64)
        self.max_length = np.zeros(0, np.int64)
        self.slot = np.zeros(0, np.int64)
        self.base = np.zeros(0, np.int64)
        self.tokens = np.zeros((0, 0), np.int64)
        self.logprobs = np.zeros((0, 0), np.float32)
        self.versions = np.zeros((0, 0), np.int32)

    _COLUMNS = (
        "group", "completion", "setting", "keys", "prompt_length", "length", "min_length",
        "max_length", "slot", "base", "tokens", "logprobs", "versions",
    )  # fmt: skip

    def add(self, request: GroupRequest, group: int, setting: int, keys: KeyArray) -> int:
        """Adds a row for each unfinished completion, with its prompt and partial tokens.

        Returns the first row.
        """
        sampling, prompt = request.sampling, request.prompt.token_ids
        unfinished = list(request.unfinished)
        first, count = self.num_rows, len(unfinished)
        self._reserve(first + count, prompt.size + sampling.max_tokens)
        rows = slice(first, first + count)
        self.num_rows += count
        self.group[rows] = group
        self.completion[rows] = unfinished
        self.setting[rows] = setting
        self.keys[rows] = keys[unfinished]
        self.prompt_length[rows] = self.length[rows] = prompt.size
        self.min_length[rows] = prompt.size + sampling.min_tokens
        self.max_length[rows] = prompt.size + sampling.max_tokens
        self.slot[rows], self.base[rows] = -1, 0
        self.tokens[rows] = prompt[0]
        self.tokens[rows, : prompt.size] = prompt
        for row, index in enumerate(unfinished if request.partials else [], start=first):
            written = request.partials[index]
            self.length[row] += written.token_ids.size
            span = slice(prompt.size, int(self.length[row]))
            self.tokens[row, span], self.logprobs[row, span] = written.token_ids, written.logprobs
        return first

    def prompt(self, row: int) -> Indices:
        """The ids of a row's prompt."""
        return self.tokens[row, : self.prompt_length[row]]

    def take_slot(self, rows: slice) -> None:
        """Gives rows of one prompt the next slot."""
        self.slot[rows] = self.slot[: self.num_rows].max() + 1
        self.base[rows] = self.prompt_length[rows]

    def close_slots(self) -> tuple[list[int], list[int]]:
        """Makes the slots in use the first ones; returns (sources, targets) of moved slots."""
        slots = self.slot[: self.num_rows]
        used = np.unique(slots[slots >= 0])
        sources, targets = used[used >= used.size], np.setdiff1d(np.arange(used.size), used)
        for source, target in zip(sources, targets, strict=True):
            slots[slots == source] = target
        return sources.tolist(), targets.tolist()

    def _reserve(self, rows: int, length: int) -> None:
        have_rows, have_length = self.tokens.shape
        rows, length = max(rows, have_rows), max(length, have_length)
        if (rows, length) == (have_rows, have_length):
            return
        for name in self._COLUMNS:
            old: npt.NDArray[Any] = getattr(self, name)
            new = np.zeros((rows, length)[: old.ndim], old.dtype)
            if name == "tokens":
                new[:have_rows] = old[:, :1] if old.size else 0
            new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, name, new)

    def append(
        self,
        rows: slice,
        tokens: npt.NDArray[np.int64],
        logprobs: npt.NDArray[np.float32],
        version: int,
    ) -> None:
        """Appends one token to each of the rows."""
        index, place = np.arange(rows.start, rows.stop), self.length[rows]
        self.tokens[index, place] = tokens
        self.logprobs[index, place] = logprobs
        self.versions[index, place] = version
        self.length[rows] += 1

    def last(self, rows: slice) -> Indices:
        """The rows' newest ids."""
        return self.tokens[np.arange(rows.start, rows.stop), self.length[rows] - 1]

    def remove(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Frees rows and closes the gaps; returns (sources, targets) of moved rows."""
        gone, kept = set(rows), self.num_rows - len(rows)
        sources = [row for row in range(kept, self.num_rows) if row not in gone]
        targets = sorted(row for row in gone if row < kept)
        for name in self._COLUMNS:
            column = getattr(self, name)
            column[targets] = column[sources]
        self.num_rows = kept
        return sources, targets

    def make_completion(
        self, row: int, finish: Finish, tokenizer: Any, versions: list[Version], before: Runs = ()
    ) -> Completion:
        """A row's completion so far.

        The version column holds indices into ``versions``. ``before`` are the versions of tokens
        that another engine wrote.
        """
        span = slice(int(self.prompt_length[row]), int(self.length[row]))
        tokens = self.tokens[row, span].astype(np.int32)
        return Completion(
            token_ids=tokens,
            logprobs=self.logprobs[row, span].copy(),
            loss_mask=np.ones(tokens.size, np.bool_),
            text=tokenizer.decode(tokens.tolist(), skip_special_tokens=True),
            finish=finish,
            version_runs=_run_lengths(self.versions[row, span], versions, before),
        )


def _run_lengths(column: npt.NDArray[np.int32], versions: list[Version], before: Runs) -> Runs:
    runs, done = list(before), sum(count for _, count in before)
    starts = [0, *(np.flatnonzero(np.diff(column[done:])) + 1).tolist()]
    for start, count in zip(starts, np.diff([*starts, column.size - done]), strict=True):
        if count:
            version, same = versions[column[done + start]], 0
            if runs and runs[-1][0] == version:
                _, same = runs.pop()
            runs.append((version, same + int(count)))
    return tuple(runs)
