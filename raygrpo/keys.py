"""Every configuration key with its default, unit and meaning, for people to read."""

from __future__ import annotations

from pydantic import BaseModel

from raygrpo.config import RunConfig, section_of


def describe_keys() -> list[tuple[str, str, str, str]]:
    """Every key as (path, default, unit, meaning), in the order of the sections."""
    return _describe(RunConfig, "")


def _describe(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is not None:
            mark = "[]" if name == "rewards" else ""
            rows += _describe(section, f"{prefix}{name}{mark}.")
            continue
        extra = info.json_schema_extra
        unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
        default = "required"
        if not info.is_required():
            default = repr(info.get_default(call_default_factory=True))
        rows.append((f"{prefix}{name}", default, unit, info.description or ""))
    return rows
