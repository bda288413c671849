"""Configurations as people write them: files, overrides, and mistakes with their fixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raygrpo.config import RunConfig
from raygrpo.config.describe import section_of
from raygrpo.config.moved import MOVED
from raygrpo.config.recipes import RECIPES
from raygrpo.errors import ConfigError, nearest


def load_config(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file (or takes a mapping), applies ``section.key=value`` overrides, validates.

    From weakest to strongest: defaults, the recipe, the file, the overrides.

    Raises:
        ConfigError: a missing or malformed file, an unknown key (with its new name, or the nearest
            known one), a value out of range, or an impossible combination.
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
    """The keys that a recipe sets, by section.

    Raises:
        ConfigError: no recipe has that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", nearest(name, list(RECIPES)))
    return RECIPES[name]


def dump_recipe(name: str) -> str:
    """The keys that a recipe sets, as YAML that a configuration can hold.

    Raises:
        ConfigError: no recipe has that name.
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
            if item["type"] != "value_error":  # its message names the fix
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


def dump_config(config: RunConfig) -> str:
    """The whole resolved configuration as YAML; loading it gives the same configuration."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    return text
