"""What a section of the configuration is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A strict, immutable section."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Values(Section):
    """Named values under one key, each of which a file may leave out; `raygrpo config` shows them
    in one row."""


def key(default: Any, doc: str, unit: str = "", **constraints: Any) -> Any:
    """A documented field; ``unit`` is shown by ``raygrpo config``."""
    extra: Any = {"unit": unit} if unit else None
    if isinstance(default, (list, dict)):
        factory = default.copy
        return Field(
            default_factory=factory, description=doc, json_schema_extra=extra, **constraints
        )
    return Field(default, description=doc, json_schema_extra=extra, **constraints)
