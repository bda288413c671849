"""The soft overlong penalty of DAPO (2503.14476, equation 13).

This module imports nothing, torch least of all: processes of rewards use it.
"""

from __future__ import annotations


def overlong_penalty(length: int, max_length: float, buffer: float) -> float:
    """0 up to ``max_length - buffer`` tokens, then linearly down to -1 at ``max_length``; -1 above.

    Lengths are in tokens. DAPO's buffer is a fifth of ``max_length``. Example: with 100 and 20, 90
    tokens cost 0.5.
    """
    over = length - (max_length - buffer)
    if over <= 0:
        return 0.0
    return -1.0 if length > max_length else -over / buffer
