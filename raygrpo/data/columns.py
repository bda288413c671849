"""Renames columns as ``data.columns`` says."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from raygrpo.errors import DataError, nearest

PROMPT = "prompt"


def renamed(columns: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with renamed columns; ``columns`` maps new names to old names.

    A new name replaces a column of the same name. The column that becomes ``prompt`` keeps its old
    name too: rewards get every column but ``prompt``, and a dataset's own rewards read the column
    under its old name.

    Example: ``{"prompt": "question"}`` turns the row ``{"question": "1+1=", "answer": "2"}`` into
    ``{"question": "1+1=", "answer": "2", "prompt": "1+1="}``.

    Raises:
        DataError: the row has no such column.
    """
    for new, old in columns.items():
        if old not in row:
            raise DataError(
                f"data.columns: there is no column {old!r} to call {new!r}", nearest(old, row)
            )
    moved = {old for new, old in columns.items() if new != PROMPT}
    kept = {name: value for name, value in row.items() if name not in moved}
    return kept | {new: row[old] for new, old in columns.items()}


def missing_prompt(names: Sequence[str]) -> DataError:
    """The error of a dataset without a column ``prompt``; it names the likeliest column."""
    close = difflib.get_close_matches(PROMPT, names, n=1, cutoff=0.4) or names[:1] or ["..."]
    return DataError(
        f"the dataset has no column {PROMPT!r}",
        f"name the one that holds it, data.columns: {{{PROMPT}: {close[0]}}}, or write a "
        f"data.template (columns: {', '.join(names)})",
    )
