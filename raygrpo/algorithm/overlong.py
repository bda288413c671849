"""The soft overlong penalty of DAPO (2503.14476, equation 13). Imports nothing: rewards use it."""

from __future__ import annotations


def overlong_penalty(length: int, max_length: float, buffer: float) -> float:
    """0 up to ``max_length - buffer`` tokens, then linearly down to -1 at ``max_length``; -1 above.

    Lengths in tokens; DAPO has a buffer of a fifth of ``max_length``.
    """
    over = length - (max_length - buffer)
    if over <= 0:
        return 0.0
    return -1.0 if length > max_length else -over / buffer
