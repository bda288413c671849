"""Stop strings, found by decoding only the newest tokens of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from raygrpo.engines.hf.rows import RowTable
from raygrpo.types import Sampling

TokenIds = npt.NDArray[np.int64]
SLACK = 4


class StopStrings:
    """Finds stop strings that end in a completion's newest token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)

    def ended(
        self, table: RowTable, rows: slice, settings: Sequence[Sampling]
    ) -> npt.NDArray[np.bool_]:
        """The rows [R] that ended with their newest token; no row ends before min_tokens."""
        ended = np.zeros(rows.stop - rows.start, np.bool_)
        stopping = [number for number, setting in enumerate(settings) if setting.stop]
        for index in np.flatnonzero(np.isin(table.setting[rows], stopping)):
            row = rows.start + index
            length, least = table.length[row], table.min_length[row]
            if length >= least:
                written = table.tokens[row, table.prompt_length[row] : length]
                stops = settings[table.setting[row]].stop
                ended[index] = self.found(written, stops, whole=bool(length == least))
        return ended

    def found(self, token_ids: TokenIds, stops: Sequence[str], *, whole: bool = False) -> bool:
        """Looks in the newest of ``token_ids`` [C], or in all of them if ``whole``.

        Each token that shows in the text adds a byte or more, so a stop string spans at most as
        many tokens as it has bytes. `SLACK` keeps it away from the cut, where decoders strip a
        space.
        """
        if not whole:
            needed = max(len(stop.encode()) for stop in stops) + SLACK
            shown = (int(token) for token in token_ids[::-1] if token not in self._special)
            if not self._contains(list(islice(shown, needed))[::-1], stops):
                return False
        return self._contains(token_ids.tolist(), stops)

    def _contains(self, token_ids: list[int], stops: Sequence[str]) -> bool:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return any(stop in text for stop in stops)
