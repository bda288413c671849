"""Built-in rewards that read only text and lengths: `exact`, `number`, `format` and `length`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Decimal, InvalidOperation, localcontext
from typing import Any

from raygrpo.algorithm.overlong import overlong_penalty

LogExtra = Callable[[str, list[Any]], None]

# A sign counts only where no operand stands before it: "10-3" ends in 3, "x = -3" in -3.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+(?!\w))?"
)


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content or ())


def report_answers(log_extra: LogExtra | None, answers: Sequence[str | None]) -> None:
    """Reports the answer that was read in each completion; None if there is none."""
    if log_extra is not None:
        log_extra("answer", list(answers))


def last_number(text: str) -> Decimal | None:
    """The last number written in a text: 1,234 or -3 or 2.50 or 1e5; "1/2" reads as 2."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
    except InvalidOperation:  # an exponent beyond what a Decimal holds
        return None


def exact(
    completions: Sequence[Any],
    column: str = "answer",
    strip: bool = True,
    first_line: bool = False,
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float]:
    """1 if the text equals ``column``, else 0.

    ``strip`` ignores white space around both; ``first_line`` looks at the completion's first line
    only (the first that is not blank, with ``strip``).
    """

    def clean(text: str) -> str:
        return text.strip() if strip else text

    texts = [clean(completion_text(completion)) for completion in completions]
    if first_line:
        texts = [clean(text.partition("\n")[0]) for text in texts]
    report_answers(log_extra, texts)
    answers = [clean(str(answer)) for answer in columns[column]]
    return [float(text == answer) for text, answer in zip(texts, answers, strict=True)]


def number(
    completions: Sequence[Any],
    log_metric: Callable[[str, float], None],
    column: str = "answer",
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 if the last number of the text equals the last number of ``column``, else 0.

    Numbers are compared exactly as decimals. An answer without a number gives None, counted in the
    metric ``number/unparsable_answer_frac``.
    """
    answers = [last_number(str(answer)) for answer in columns[column]]
    log_metric("number/unparsable_answer_frac", answers.count(None) / len(answers))
    found = [last_number(completion_text(completion)) for completion in completions]
    report_answers(log_extra, [None if n is None else _canonical(n) for n in found])
    return [
        None if answer is None else float(value == answer)
        for value, answer in zip(found, answers, strict=True)
    ]


def _canonical(value: Decimal) -> str:
    """Equal numbers written alike: 2.50 and 2.5, -0 and 0."""
    if not value:
        return "0"
    with localcontext(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN):  # exact, whatever its size
        return str(value.normalize())


def format(completions: Sequence[Any], pattern: str, **columns: Any) -> list[float]:
    """1 if the whole text matches the regular expression ``pattern`` (``.`` matches newlines).

    A pattern that backtracks without end is ended by the call's deadline.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(completion_text(item)) is not None) for item in completions]


def length(
    completion_ids: Sequence[Sequence[int]], max_length: int, buffer: int, **columns: Any
) -> list[float]:
    """The soft overlong penalty of DAPO (arXiv 2503.14476, equation 13), in tokens.

    0 up to ``max_length - buffer``, then linearly down to -1 at ``max_length`` and beyond.
    """
    return [overlong_penalty(len(ids), max_length, buffer) for ids in completion_ids]
