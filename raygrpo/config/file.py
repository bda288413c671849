"""Configurations as people write and read them: files, overrides, mistakes, and what keys mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raygrpo.config import RunConfig
from raygrpo.config.moved import MOVED
from raygrpo.config.recipes import RECIPES
from raygrpo.config.sections import DataChanges, DataKeys, PartSection
from raygrpo.errors import ConfigError, nearest


def load_config(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file (or takes a mapping), applies ``section.key=value`` overrides, validates.

    From weakest to strongest: defaults, the recipe, the file, the overrides.

    Raises:
        ConfigError: a missing or malformed file, an unknown key (with the nearest known one), a
            value out of range, or an impossible combination.
    """
    user = deepcopy(dict(source)) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for override in overrides:
        _apply_override(user, override)
    _refuse_moved(user)
    recipe = str(user.get("recipe", "default"))
    overridden = recipe_overrides(recipe)
    try:
        return RunConfig.model_validate(merged_sections(overridden, user))
    except ValidationError as error:
        raise _explain(error) from None


def recipe_overrides(name: str) -> Mapping[str, Any]:
    """What a recipe sets.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", nearest(name, list(RECIPES)))
    return RECIPES[name]


def dump_recipe(name: str) -> str:
    """What a recipe sets, as YAML that a configuration can hold.

    Raises:
        ConfigError: there is none of that name.
    """
    text: str = yaml.safe_dump({"recipe": name, **recipe_overrides(name)}, sort_keys=False)
    return text


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}", "check the path")
    try:
        loaded = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping of sections")
    return loaded


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, sign, value = override.removeprefix("--").partition("=")
    if not sign or not path:
        raise ConfigError(f"cannot read the override {override!r}", "write --section.key=value")
    *parents, leaf = path.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is no section")
        tree = child
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def _refuse_moved(user: Mapping[str, Any]) -> None:
    for old, new in MOVED.items():
        found: Any = user
        for name in old.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if found is not None:
            raise ConfigError(f"unknown key {old}", f"the key is {new} now")


def merged_sections(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, section by section."""
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = merged_sections(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _explain(error: ValidationError) -> ConfigError:
    """Turns pydantic's report into one ConfigError that names keys as the user writes them."""
    lines, fixes = [], []
    for item in error.errors():
        location = _as_written(item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {location}")
            fixes.append(nearest(str(item["loc"][-1]), _known_keys(item["loc"][:-1])))
        elif item["type"] == "missing":
            lines.append(f"missing key {location}")
            fixes.append(f"set {location}")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            lines.append(f"{location}: {reason}" if location else reason)
            if location:
                fixes.append(f"it is {item['input']!r} now")
    return ConfigError("; ".join(lines), "; ".join(fixes))


def _as_written(location: tuple[int | str, ...]) -> str:
    """``("data", "mixture", 0, "source")`` is ``data.mixture[0].source``."""
    pieces = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(pieces).removeprefix(".")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, str):
            section = section_of(model.model_fields[part].annotation)
            assert section is not None
            model = section
    return list(model.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone or in a list; None for a plain value."""
    arguments = getattr(annotation, "__args__", (annotation,))
    nested = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
    return nested[0] if nested else None


def dump_config(config: RunConfig) -> str:
    """The whole resolved configuration as YAML; loading it gives the same configuration."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    return text


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
        default = "required" if info.is_required() else repr(info.default)
        meaning = info.description or ""
        if issubclass(model, DataChanges) and name in DataKeys.model_fields:
            outer = prefix.removesuffix("mixture[].") if model is PartSection else "data."
            default, meaning = "inherited", f"In place of {outer}{name}."
        rows.append(Key(f"{prefix}{name}", _type_name(info.annotation), default, unit, meaning))
    return rows


def _type_name(annotation: Any) -> str:
    """A type as users write its values: ``int``, ``str | None``, ``k2 | k3``, ``mapping``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        return "list"
    return "None" if annotation is NoneType else str(annotation.__name__)
