"""Makes prompts of a source's rows: names, renders, tokenises and measures them."""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from raygrpo.config import DataSection
from raygrpo.data.sources import GYM, decode_metadata
from raygrpo.errors import ConfigError, DataError, nearest
from raygrpo.types import Message, Prompt

PROMPT = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A row's prompt: ``text`` or ``messages``, and the ``string`` that is tokenised.

    Example: messages ``({"role": "user", "content": "hi"},)``, string ``"<user>hi\\n<assistant>"``.
    """

    text: str | None
    messages: tuple[Message, ...] | None
    string: str


class PromptMaker:
    """Makes prompts of rows as a `DataSection` says; rows have the source's own column names.

    A prompt has the row's columns without the column ``prompt``, as TRL hands them to rewards.
    Text gets the special tokens that the tokenizer puts in front, and none that it appends, such as
    an end-of-sequence token. Chat templates write their own special tokens.

    Attributes:
        num_dropped: rows that `fits` left out because their prompt is too long.
        num_truncated: rows whose prompt is too long and is cut on the left.

    Raises:
        DataError: a column is missing, or a field of the template is no column.
        ConfigError: the template is malformed, or the tokenizer has no chat template.
    """

    def __init__(self, section: DataSection, columns: Sequence[str], tokenizer: Any) -> None:
        self._section, self._tokenizer = section, tokenizer
        names = list(renamed(section.columns, dict.fromkeys(columns)))
        if section.template is not None:
            _check_template(section.template, names)
        elif PROMPT not in names:
            raise _missing_prompt(names)
        if section.chat:
            self._check_chat("data.chat is true")
        self._in_front = _tokens_in_front(tokenizer)
        self.num_dropped = 0
        self.num_truncated = 0

    def token_ids(self, rows: Sequence[Mapping[str, Any]], first: int) -> list[list[int]]:
        """Token ids of the prompts of consecutive rows, uncut; ``first`` numbers the first row."""
        return self._tokenize([self.render(row, n) for n, row in enumerate(rows, first)])

    def fits(self, number: int, length: int) -> bool:
        """Whether row ``number``, a prompt of ``length`` tokens, is used; counts long prompts.

        Raises:
            DataError: the prompt is empty, or too long with ``overlong: error``.
        """
        limit, action = self._section.max_prompt_length, self._section.overlong
        if not length:
            raise DataError(f"row {number} has a prompt without tokens", "remove the row")
        if length <= limit:
            return True
        if action == "error":
            raise DataError(
                f"row {number} has a prompt of {length} tokens, over data.max_prompt_length "
                f"({limit})",
                f"raise it to {length}, or set data.overlong to drop or truncate_left",
            )
        self.num_truncated += action == "truncate_left"
        self.num_dropped += action == "drop"
        return action == "truncate_left"

    def make(self, row: Mapping[str, Any], number: int) -> Prompt | None:
        """The prompt of a row; None if the prompt is dropped."""
        rendered = self.render(row, number)
        ids = self._tokenize([rendered])[0]
        if not self.fits(number, len(ids)):
            return None
        columns = renamed(self._section.columns, row)
        columns.pop(PROMPT, None)
        if self._section.source.startswith(GYM) and isinstance(columns.get("metadata"), str):
            columns["metadata"] = decode_metadata(columns["metadata"])
        return Prompt(
            id=f"row-{number}",
            token_ids=np.array(ids[-self._section.max_prompt_length :], dtype=np.int32),
            text=rendered.text,
            messages=rendered.messages,
            columns=columns,
        )

    def render(self, row: Mapping[str, Any], number: int) -> Rendered:
        """The prompt of a row, which errors name by its number.

        Raises:
            DataError: the row's prompt is neither text nor a list of chat messages, or is empty.
            ConfigError: the prompt does not go with data.chat or data.system.
        """
        section, name = self._section, f"row {number}"
        row = renamed(section.columns, row)
        if section.template is not None:
            content: Any = _fill(section.template, row, name)
        else:
            content = row.get(PROMPT)
        if isinstance(content, str):
            if not content:
                raise DataError(f"{name} has an empty prompt", "remove the row, or give it text")
            if not section.chat:
                if section.system is not None:
                    raise ConfigError(
                        f"data.system is set, but the prompt of {name} is plain text, which has no "
                        "roles",
                        "set data.chat: true to make it a user turn, or write the system's text "
                        "into a data.template",
                    )
                return Rendered(text=content, messages=None, string=content)
            content = [{"role": "user", "content": content}]
        return self._render_messages(self._with_system(_messages(content, name)), name)

    def _tokenize(self, prompts: Sequence[Rendered]) -> list[list[int]]:
        encoded = self._tokenizer(
            [prompt.string for prompt in prompts],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        tokens = []
        bos = getattr(self._tokenizer, "bos_token", None)
        for prompt, ids in zip(prompts, encoded["input_ids"], strict=True):
            # A chat brings its special tokens, and so does text that was made from a chat.
            marked = prompt.messages is not None or (bos and prompt.string.startswith(bos))
            tokens.append(list(ids) if marked else [*self._in_front, *ids])
        return tokens

    def _render_messages(self, messages: tuple[Message, ...], name: str) -> Rendered:
        if self._section.chat is False:
            raise ConfigError(
                f"{name} is a list of messages but data.chat is false",
                "leave data.chat out, or make text of them with data.template",
            )
        self._check_chat(f"{name} is a list of messages")
        # A last message of the assistant's is a beginning that the policy goes on with, as in TRL.
        continues = messages[-1]["role"] == "assistant"
        try:
            string = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **self._section.chat_params,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses {name}: {error}") from error
        return Rendered(text=None, messages=messages, string=string)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        system = self._section.system
        if system is None or any(message["role"] == "system" for message in messages):
            return messages
        return ({"role": "system", "content": system}, *messages)

    def _check_chat(self, reason: str) -> None:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"{reason}, but the model's tokenizer has no chat template",
                "set data.chat: false with a data.template that makes text, or use a chat model",
            )


def renamed(columns: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with renamed columns; ``columns`` maps new names to old names.

    A new name replaces a column of the same name. The column that becomes ``prompt`` keeps its old
    name too: rewards get every column but ``prompt``, and a dataset's own rewards read the column
    under its old name.

    Example: ``{"prompt": "question"}`` turns the row ``{"question": "1+1=", "answer": "2"}`` into
    ``{"question": "1+1=", "answer": "2", "prompt": "1+1="}``.

    Raises:
        DataError: the row has no such column.
    """
    for new, old in columns.items():
        if old not in row:
            raise DataError(
                f"data.columns: there is no column {old!r} to call {new!r}", nearest(old, row)
            )
    moved = {old for new, old in columns.items() if new != PROMPT}
    kept = {name: value for name, value in row.items() if name not in moved}
    return kept | {new: row[old] for new, old in columns.items()}


def _missing_prompt(names: Sequence[str]) -> DataError:
    """The error of a dataset without a column ``prompt``; it names the likeliest column."""
    close = difflib.get_close_matches(PROMPT, names, n=1, cutoff=0.4) or names[:1] or ["..."]
    return DataError(
        f"the dataset has no column {PROMPT!r}",
        f"name the one that holds it, data.columns: {{{PROMPT}: {close[0]}}}, or write a "
        f"data.template (columns: {', '.join(names)})",
    )


def _messages(content: Any, name: str) -> tuple[Message, ...]:
    fits = isinstance(content, (list, tuple)) and all(
        isinstance(item, Mapping) and isinstance(item.get("role"), str) for item in content
    )
    if not fits or not content:
        raise DataError(
            f"{name}: column {PROMPT!r} holds {_shorten(content)}, "
            "neither text nor a list of chat messages with roles",
            "correct the row, or name another column in data.columns",
        )
    # Arrow fills the keys that only some rows' messages have with None.
    return tuple({k: v for k, v in item.items() if v is not None} for item in content)


def _shorten(content: Any) -> str:
    shown = repr(content)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _check_template(template: str, columns: Sequence[str]) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(
            f"data.template: {error}", "write {{ and }} for braces that are no field"
        ) from None
    for field in fields:
        root = None if field is None else field.partition(".")[0].partition("[")[0]
        if root is not None and root not in columns:
            raise DataError(
                f"data.template has a field {{{field}}}, which is no column",
                f"{nearest(root, columns)} (columns: {', '.join(columns)}); "
                "write {{ and }} for braces that are no field",
            )


def _fill(template: str, row: Mapping[str, Any], name: str) -> str:
    try:
        return template.format_map(row)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"data.template does not fit {name}: {error!r}") from error


def _tokens_in_front(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []
