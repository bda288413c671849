"""A reward that costs nothing and differs within a group: for timing, not for learning."""

from __future__ import annotations

from typing import Any


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The share of vowels among a completion's characters."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
