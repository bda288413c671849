"""Finds reward functions: built in, ``module:function``, ``file.py:function``, or from Python.

The driver checks (`check_reward`) without running any user code; a child loads (`load_reward`).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
import pickle
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle

from raygrpo.config import RewardSection
from raygrpo.config.sections import reward_name
from raygrpo.errors import ConfigError, RewardError, nearest
from raygrpo.rewards.contract import Setup
from raygrpo.rewards.params import (
    ColumnParams,
    ExactParams,
    FormatParams,
    GymParams,
    HttpParams,
    JudgeParams,
    LengthParams,
    Params,
    RewardModelParams,
    ServiceParams,
    read_params,
)

REWARD_MODEL = "reward_model"


class Builtin(NamedTuple):
    """A built-in reward: its place, as module:name, and the parameters it takes.

    A function gets its parameters with every call. The class of a service is made of (parameters,
    `Setup`), and the object is called. `reward_model` has no place: its actors are `RewardModel`s.
    """

    target: str
    params: type[Params]


BUILTINS: Mapping[str, Builtin] = {
    "exact": Builtin("raygrpo.rewards.text:exact", ExactParams),
    "number": Builtin("raygrpo.rewards.text:number", ColumnParams),
    "format": Builtin("raygrpo.rewards.text:format", FormatParams),
    "length": Builtin("raygrpo.rewards.text:length", LengthParams),
    "math": Builtin("raygrpo.rewards.math_answer:math", ColumnParams),
    "reasoning_gym": Builtin("raygrpo.rewards.gym:reasoning_gym", GymParams),
    "http": Builtin("raygrpo.rewards.service:HttpReward", HttpParams),
    "judge": Builtin("raygrpo.rewards.judge:JudgeReward", JudgeParams),
    REWARD_MODEL: Builtin("", RewardModelParams),
}


def pack_function(function: Callable[..., Any]) -> bytes:
    """A callable passed in Python, closures included, as bytes for a child process.

    Raises:
        ConfigError: the callable holds a value that cannot be pickled.
    """
    try:
        data: bytes = cloudpickle.dumps(function)
    except (pickle.PicklingError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"the reward function {function!r} cannot be pickled: {error}",
            "create locks, clients and open files inside the function",
        ) from error
    return data


def check_reward(section: RewardSection, passed: Collection[str] = ()) -> None:
    """Finds mistakes before any process starts; runs no user code.

    ``passed`` are the names of functions passed in Python, which are not looked up.

    Raises:
        ConfigError: an unknown built-in or parameter of one; a missing file or module; a file with
            a syntax error or without that name at its top level.
    """
    if reward_name(section) in passed:
        return
    place, _, attribute = section.func.rpartition(":")
    if not place:
        _check_builtin(section)
    elif _is_file(place):
        _check_file(_path(place), attribute)
    elif attribute.isidentifier() and not place.startswith("."):
        _check_module(place)
    else:
        raise ConfigError(
            f"reward {section.func!r} names no function",
            "write module:function or file.py:function",
        )


def reward_models(rewards: Sequence[RewardSection]) -> dict[str, RewardModelParams]:
    """By reward name, the parameters of rewards that are models in actors of their own."""
    # A function of that name, passed in Python, has no parameters; a reward model has its path.
    return {
        reward_name(reward): read_params(RewardModelParams, reward)
        for reward in rewards
        if reward.func == REWARD_MODEL and reward.params
    }


def anchor_reward(section: RewardSection) -> RewardSection:
    """The section with its local path made absolute, for processes that run elsewhere."""
    if section.func == REWARD_MODEL and "path" in section.params:
        path = _path(section.params["path"])
        params = {**section.params, "path": str(path)} if path.exists() else section.params
        return section.model_copy(update={"params": params})
    place, colon, attribute = section.func.rpartition(":")
    if not colon or not _is_file(place):
        return section
    return section.model_copy(update={"func": f"{_path(place)}:{attribute}"})


def load_reward(setup: Setup) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """A reward function, imported in its child process, and the parameters of every call.

    Raises:
        RewardError: the object is not callable, or does not take the configured parameters.
        Exception: whatever importing the user's code raises.
    """
    params = setup.params
    if setup.pickled is not None:
        function: Any = cloudpickle.loads(setup.pickled)
    elif setup.func not in BUILTINS:
        function = _import(setup.func)
    else:
        target, model = BUILTINS[setup.func]
        function, given = _import(target), model.model_validate(params)
        if issubclass(model, ServiceParams):
            function, params = function(given, setup), {}
        else:  # all of them: a column of a parameter's name is no parameter
            params = given.model_dump()
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"a {type(function).__name__}"
        raise RewardError(f"reward {setup.name}: {setup.func} is {kind}, not a function")
    accepted = accepted_arguments(function)
    if accepted is not None and (unknown := sorted(params.keys() - accepted)):
        raise RewardError(
            f"reward {setup.name}: {setup.func} takes no parameter {', '.join(unknown)}",
            "remove it from rewards[].params, or add it to the function",
        )
    return function, params


def accepted_arguments(function: Callable[..., Any]) -> frozenset[str] | None:
    """The keyword arguments that a callable names; None if it takes any, or if it does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named)


def _import(func: str) -> Any:
    place, _, attribute = func.rpartition(":")
    module = _load_file(_path(place)) if _is_file(place) else importlib.import_module(place)
    return operator.attrgetter(attribute)(module)


def _load_file(path: Path) -> Any:
    name = f"raygrpo_reward_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # As for a script: its neighbours can be imported. Last, so that they shadow nothing.
    sys.path.append(str(path.parent))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _path(place: str) -> Path:
    return Path(place).expanduser().absolute()


def _check_model_path(path: str) -> None:
    place = _path(path)
    looks_local = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if not place.exists() and not looks_local:
        return  # a hub id: what it holds is found when its actor starts
    if not (place / "config.json").is_file():
        raise ConfigError(
            f"reward {REWARD_MODEL}: path {path!r} holds no config.json",
            "name the directory of a sequence-classification model, or its hub id",
        )


def _check_builtin(section: RewardSection) -> None:
    builtin = BUILTINS.get(section.func)
    if builtin is None:
        raise ConfigError(
            f"unknown reward {section.func!r}",
            f"{nearest(section.func, BUILTINS)} (or write module:function, file.py:function)",
        )
    params = read_params(builtin.params, section)
    if isinstance(params, RewardModelParams):
        _check_model_path(params.path)


def _check_module(place: str) -> None:
    top = place.partition(".")[0]
    if top == "__main__":
        raise ConfigError(
            "a reward in __main__ cannot be found by name", "pass the function itself from Python"
        )
    # Only the top package is looked up: finding a submodule would import its parents.
    here = [str(Path.cwd())]
    found = top in sys.modules or importlib.util.find_spec(top) or PathFinder.find_spec(top, here)
    if not found:
        raise ConfigError(
            f"no module {top!r} for the reward {place!r}",
            f"install it, put it into {here[0]}, or write its path",
        )


def _check_file(path: Path, attribute: str) -> None:
    if not path.is_file():
        raise ConfigError(f"no reward file at {path}", "check the path")
    try:
        # Compiled, not run; the code names all that its top level binds or uses.
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} is no valid Python: {error}") from None
    if attribute.partition(".")[0] not in code.co_names and ("*",) not in code.co_consts:
        known = [name for name in code.co_names if not name.startswith("_")]
        raise ConfigError(
            f"{path} defines no {attribute!r}",
            nearest(attribute, known) if known else "it defines nothing",
        )
