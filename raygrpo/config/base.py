"""Sections and keys: the pieces of a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A strict, immutable section."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def key(default: Any, doc: str, unit: str = "", **constraints: Any) -> Any:
    """A documented field; ``unit`` is shown by ``raygrpo config``."""
    extra: Any = {"unit": unit} if unit else None
    return Field(default, description=doc, json_schema_extra=extra, **constraints)
