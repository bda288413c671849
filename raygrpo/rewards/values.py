"""Reads the values that a reward returns."""

from __future__ import annotations

import math
import numbers
from decimal import Decimal
from typing import Any

MAX_ERROR_CHARS = 300


def read_values(name: str, values: Any, size: int) -> tuple[list[float | None], list[str | None]]:
    """The parts and errors [size] in the answer of the reward ``name``.

    Raises:
        TypeError, ValueError: the answer is no list of ``size`` entries.
    """
    if not isinstance(values, (list, tuple)) and hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"returned a {type(values).__name__}, not a list of {size} rewards")
    if len(values) != size:
        raise ValueError(f"returned {len(values)} rewards for {size} completions")
    parts: list[float | None] = []
    errors: list[str | None] = []
    for value in values:
        part, error = _read_value(value)
        parts.append(part)
        errors.append(f"{name}: {error}"[:MAX_ERROR_CHARS] if error else None)
    return parts, errors


def _read_value(value: Any) -> tuple[float | None, str | None]:
    if value is None:
        return None, None
    if isinstance(value, Exception):
        return None, clean(str(value) or type(value).__name__)
    try:
        part = number(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None, f"returned {clean(repr(value))[:80]}, which is no number"
    return (part, None) if math.isfinite(part) else (None, f"returned {part}, which is not finite")


def number(value: Any) -> float:
    """A float from a number, a numpy scalar, or anything with ``item()``, such as a tensor."""
    if not isinstance(value, (numbers.Real, Decimal)) and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (numbers.Real, Decimal)):
        raise TypeError(f"a {type(value).__name__} is no number")
    return float(value)


def clean(text: str) -> str:
    """Text that can be written as UTF-8 anywhere: completions may hold lone surrogates."""
    return text.encode("utf-8", "replace").decode()
