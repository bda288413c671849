"""An endless, resumable stream of prompts over a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import xxhash

from raygrpo.config import DataSection
from raygrpo.data.rendering import Rendered, Renderer
from raygrpo.data.sources import GYM, decode_metadata
from raygrpo.errors import DataError
from raygrpo.types import Prompt, Stream

_BATCH = 1000
_STREAM_KEYS: Mapping[Stream, int] = {"train": 0, "eval": 1}


class PromptSource:
    """Prompts in an order that depends on (seed, stream, epoch) alone, epoch after epoch.

    Every row is rendered and tokenised once at construction, so that a row that cannot be used is
    found before a model is loaded. A prompt's id names its row; its columns are the row without the
    column ``prompt``, as TRL hands them to rewards.

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
        self._renderer = Renderer(section, rows.column_names, tokenizer)
        self._key = (seed, _STREAM_KEYS[stream])
        self._position = 0
        self.num_truncated = 0
        self._kept, self._checksum = self._scan()
        self.num_dropped = len(rows) - len(self._kept)
        self._epoch_order = (-1, self._kept)

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._kept)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._position / len(self._kept)

    def next(self) -> Prompt:
        """The next prompt; after the last one of an epoch, the first of a new one."""
        epoch, index = divmod(self._position, len(self._kept))
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self._order(epoch))
        prompt = self._prompt(int(self._epoch_order[1][index]))
        self._position += 1
        return prompt

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts of the dataset in its own order; all where there are fewer."""
        return [self._prompt(int(row)) for row in self._kept[:num_prompts]]

    def state(self) -> dict[str, int]:
        """The cursor, to be given to `restore`; plain integers."""
        return {"position": self._position, "checksum": self._checksum}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was taken.

        Raises:
            DataError: the prompts are not those that the state was taken over.
        """
        if state["checksum"] != self._checksum:
            raise DataError(
                f"the prompts of data.source {self._section.source!r} changed since the checkpoint",
                "restore the data to resume, or start again in another run_dir",
            )
        self._position = state["position"]

    def _scan(self) -> tuple[npt.NDArray[np.int64], int]:
        """Row numbers that stay, and a checksum over every prompt's token ids."""
        kept: list[int] = []
        digest = xxhash.xxh3_64()
        for start in range(0, len(self._rows), _BATCH):
            numbers = range(start, min(start + _BATCH, len(self._rows)))
            rendered = [self._render(number) for number in numbers]
            for number, ids in zip(numbers, self._renderer.tokenize(rendered), strict=True):
                digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
                if self._fits(number, len(ids)):
                    kept.append(number)
        if not kept:
            raise DataError(
                f"no prompt is within data.max_prompt_length ({self._section.max_prompt_length})",
                "raise data.max_prompt_length",
            )
        # 63 bits: what every JSON and msgpack reader takes as an integer.
        return np.array(kept, dtype=np.int64), digest.intdigest() >> 1

    def _fits(self, number: int, length: int) -> bool:
        limit, action = self._section.max_prompt_length, self._section.overlong
        if not length:
            raise DataError(f"row {number} has a prompt without tokens", "remove the row")
        if length <= limit:
            return True
        if action == "truncate_left":
            self.num_truncated += 1
            return True
        if action == "drop":
            return False
        raise DataError(
            f"row {number} has a prompt of {length} tokens, over data.max_prompt_length ({limit})",
            f"raise it to {length}, or set data.overlong to drop or truncate_left",
        )

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._section.shuffle:
            return self._kept
        return np.random.default_rng((*self._key, epoch)).permutation(self._kept)

    def _render(self, number: int) -> Rendered:
        return self._renderer.render(self._row(number), f"row {number}")

    def _row(self, number: int) -> dict[str, Any]:
        return self._renderer.name_columns(self._rows[number])

    def _prompt(self, number: int) -> Prompt:
        row = self._row(number)
        rendered = self._renderer.render(row, f"row {number}")
        ids = self._renderer.tokenize([rendered])[0][-self._section.max_prompt_length :]
        columns = {name: value for name, value in row.items() if name != "prompt"}
        if self._section.source.startswith(GYM) and isinstance(columns.get("metadata"), str):
            columns["metadata"] = decode_metadata(columns["metadata"])
        return Prompt(
            id=f"row-{number}",
            token_ids=np.array(ids, dtype=np.int32),
            text=rendered.text,
            messages=rendered.messages,
            columns=columns,
        )
