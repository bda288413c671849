"""Makes prompts of a source's rows, within ``data.max_prompt_length``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raygrpo.config import DataSection
from raygrpo.data.columns import PROMPT
from raygrpo.data.rendering import Renderer
from raygrpo.data.sources import GYM, decode_metadata
from raygrpo.errors import DataError
from raygrpo.types import Prompt


class PromptMaker:
    """Makes prompts of rows; rows have the source's own column names.

    A prompt has the row's columns without the column ``prompt``, as TRL hands them to rewards.

    Attributes:
        num_dropped: rows that `fits` left out because their prompt is too long.
        num_truncated: rows whose prompt is too long and is cut on the left.

    Raises:
        DataError: a column is missing, or a field of the template is no column.
        ConfigError: the template is malformed, or the tokenizer has no chat template.
    """

    def __init__(self, section: DataSection, columns: Sequence[str], tokenizer: Any) -> None:
        self._section = section
        self._renderer = Renderer(section, columns, tokenizer)
        self.num_dropped = 0
        self.num_truncated = 0

    def tokenize(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[int]]:
        """Token ids of the rows' prompts, uncut; errors call a row by its name."""
        rendered = [
            self._renderer.render(self._renderer.name_columns(row), name)
            for row, name in zip(rows, names, strict=True)
        ]
        return self._renderer.tokenize(rendered)

    def fits(self, name: str, length: int) -> bool:
        """Whether a prompt of ``length`` tokens is used; counts prompts that are too long.

        Raises:
            DataError: the prompt is empty, or too long with ``overlong: error``.
        """
        limit, action = self._section.max_prompt_length, self._section.overlong
        if not length:
            raise DataError(f"{name} has a prompt without tokens", "remove the row")
        if length <= limit:
            return True
        if action == "error":
            raise DataError(
                f"{name} has a prompt of {length} tokens, over data.max_prompt_length ({limit})",
                f"raise it to {length}, or set data.overlong to drop or truncate_left",
            )
        self.num_truncated += action == "truncate_left"
        self.num_dropped += action == "drop"
        return action == "truncate_left"

    def make(self, row: Mapping[str, Any], prompt_id: str, name: str) -> Prompt | None:
        """The prompt of a row; None if the prompt is dropped."""
        row = self._renderer.name_columns(row)
        rendered = self._renderer.render(row, name)
        ids = self._renderer.tokenize([rendered])[0]
        if not self.fits(name, len(ids)):
            return None
        columns = {column: value for column, value in row.items() if column != PROMPT}
        if self._section.source.startswith(GYM) and isinstance(columns.get("metadata"), str):
            columns["metadata"] = decode_metadata(columns["metadata"])
        return Prompt(
            id=prompt_id,
            token_ids=np.array(ids[-self._section.max_prompt_length :], dtype=np.int32),
            text=rendered.text,
            messages=rendered.messages,
            columns=columns,
        )


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
