"""Parameters of the built-in rewards: strict models, checked before a run starts."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from raygrpo.config import RewardSection
from raygrpo.errors import ConfigError, nearest

P = TypeVar("P", bound="Params")

Scale = Annotated[tuple[float, float], Field(strict=False)]
# The name of an environment variable: a secret written in its place does not pass for one.
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
_SECRET = re.compile(r"key|token|secret|passw|credential|sig$|auth", re.I)


def _check_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write http://host/path or https://host/path")
    if parts.username or parts.password:
        raise ValueError("no credentials in an address: name an environment variable instead")
    if secrets := [name for name, _ in parse_qsl(parts.query) if _SECRET.search(name)]:
        raise ValueError(f"no secret ({secrets[0]}) in an address: send it by headers_env")
    return value


def _check_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return value


Url = Annotated[str, AfterValidator(_check_url)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]


class Params(BaseModel):
    """A strict, immutable set of parameters; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ColumnParams(Params):
    """Parameters of `number` and `math`: the column that holds the answer."""

    column: str = "answer"


class ExactParams(ColumnParams):
    """Parameters of `exact`."""

    strip: bool = True
    first_line: bool = False


class FormatParams(Params):
    """Parameters of `format`: a regular expression."""

    pattern: Pattern


class LengthParams(Params):
    """Parameters of `length`, in tokens."""

    max_length: int
    buffer: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> LengthParams:
        if self.buffer > self.max_length:
            raise ValueError("use token counts with 0 <= buffer <= max_length")
        return self


class GymParams(Params):
    """Parameters of `reasoning_gym`; without ``task`` a row's metadata name its task."""

    task: str | None = None


class ServiceParams(Params):
    """How any service is called.

    ``concurrency`` requests are under way at once. After a failure that may pass, a request is sent
    again, up to ``retries`` times. ``request_timeout_s`` bounds one request, in seconds.
    """

    concurrency: int = Field(8, ge=1)
    retries: int = Field(4, ge=0)
    request_timeout_s: float = Field(30.0, gt=0)


class HttpParams(ServiceParams):
    """Parameters of `http`.

    ``batch_size`` completions go into one request (0: all of a group); ``headers_env`` maps a
    header to the *name* of the environment variable that holds its value; ``columns`` are the
    dataset columns sent (None: all).
    """

    url: Url
    batch_size: int = Field(0, ge=0)
    headers_env: dict[str, Variable] = {}
    columns: list[str] | None = None


class JudgeParams(ServiceParams):
    """Parameters of `judge`.

    ``base_url`` is the address to which ``/chat/completions`` is added. ``rubric`` says how to
    grade, with fields ``{prompt}``, ``{completion}`` and the names of columns. ``scale`` holds the
    worst and the best grade. ``max_tokens`` and ``temperature`` are left out of the request where
    None; ``extra_body`` is added to it. ``api_key_env`` names an environment variable.
    """

    base_url: Url
    model: str
    rubric: str
    scale: Scale = (0.0, 10.0)
    api_key_env: Variable | None = None
    max_tokens: int | None = Field(512, ge=1)
    temperature: float | None = Field(0.0, ge=0)
    seed: int | None = None
    extra_body: dict[str, Any] = {}

    @model_validator(mode="after")
    def _makes_sense(self) -> JudgeParams:
        if not self.scale[0] < self.scale[1]:
            raise ValueError("scale needs the worst grade first, then a higher best one")
        if "completion" not in rubric_fields(self.rubric):
            raise ValueError("rubric needs the field {completion}")
        return self


class RewardModelParams(Params):
    """Parameters of `reward_model`.

    ``count`` actors with ``gpus`` GPUs (a fraction shares one; 0 is CPU) and ``threads`` CPU
    threads each. ``batch_size`` sequences are computed at once; longer ones than ``max_length``
    tokens lose their beginning. ``label`` chooses among several labels. ``template``: "chat" is the
    tokenizer's chat template, "plain" concatenates prompt and completion; None is "chat" for
    prompts that are messages and "plain" for text.
    """

    path: str
    revision: str | None = None
    count: int = Field(1, ge=1)
    gpus: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(2048, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    label: int | None = Field(None, ge=0)
    template: Literal["chat", "plain"] | None = None


def read_params(model: type[P], section: RewardSection) -> P:
    """The section's ``params`` as ``model``.

    Raises:
        ConfigError: an unknown parameter (with the nearest known one), a missing or a wrong one.
    """
    try:
        return model.model_validate(section.params)
    except ValidationError as error:
        raise _explain(error, model, section.func) from None


def rubric_fields(rubric: str) -> set[str]:
    """The names of the ``{fields}`` of a rubric.

    Raises:
        ValueError: braces that do not pair, or more than a plain name between them.
    """
    names = set()
    for _, name, form, conversion in string.Formatter().parse(rubric):
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(
                f"rubric has the field {{{name}}}: write a plain name, and {{{{ }}}} for braces"
            )
        names.add(name)
    return names


def _explain(error: ValidationError, model: type[Params], func: str) -> ConfigError:
    lines, fixes = [], []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"reward {func} has no parameter {where!r}")
            fixes.append(nearest(where, list(model.model_fields)))
        elif item["type"] == "missing":
            lines.append(f"reward {func} needs {where}")
            fixes.append(f"set params.{where}")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            lines.append(f"reward {func}: {where + ': ' if where else ''}{reason}")
    return ConfigError("; ".join(lines), "; ".join(fixes))
