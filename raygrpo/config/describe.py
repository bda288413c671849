"""What each key means: the rows of `raygrpo config`."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from raygrpo.config import RunConfig
from raygrpo.config.sections import DataChanges, DataKeys, PartSection


class Key(NamedTuple):
    """What `raygrpo config` says of a key.

    Example: ``Key("train.steps", "int", "100", "steps", "Steps of the run.")``.
    """

    path: str
    type: str
    default: str
    unit: str
    meaning: str


def describe_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[Key]:
    """Every key of a section and of the sections in it, in their order."""
    rows: list[Key] = []
    for name, info in model.model_fields.items():
        if (section := section_of(info.annotation)) is not None:
            mark = "[]" if get_origin(info.annotation) is list else ""
            rows += describe_keys(section, f"{prefix}{name}{mark}.")
            continue
        extra = info.json_schema_extra
        unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
        default = "required" if info.is_required() else json.dumps(info.default)
        meaning = info.description or ""
        if issubclass(model, DataChanges) and name in DataKeys.model_fields:
            outer = prefix.removesuffix("mixture[].") if model is PartSection else "data."
            default, meaning = "inherited", f"In place of {outer}{name}."
        rows.append(Key(f"{prefix}{name}", _type_name(info.annotation), default, unit, meaning))
    return rows


def _type_name(annotation: Any) -> str:
    """A type as users write its values: ``int``, ``str | null``, ``k2 | k3``, ``mapping``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        return "list"
    return "null" if annotation is NoneType else str(annotation.__name__)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone or in a list; None for a plain value."""
    arguments = getattr(annotation, "__args__", (annotation,))
    nested = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
    return nested[0] if nested else None
