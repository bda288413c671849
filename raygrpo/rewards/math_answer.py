"""The built-in reward `math`: symbolic equality by math-verify.

math-verify bounds its own work by SIGALRM, so it works in a process's main thread only. A reward's
child makes its calls there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from raygrpo.rewards.text import LogExtra, completion_text, report_answers

MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


def math(
    completions: Sequence[Any],
    log_metric: Callable[[str, float], None],
    column: str = "answer",
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 if the text's final answer equals the answer in ``column`` mathematically, else 0.

    An answer that cannot be parsed gives None, counted in ``math/unparsable_answer_frac``.
    """
    answers = [_parse_answer(str(answer)) for answer in columns[column]]
    log_metric("math/unparsable_answer_frac", answers.count(()) / len(answers))
    found = [parse(completion_text(completion)) for completion in completions]
    report_answers(log_extra, [str(parsed[0]) if parsed else None for parsed in found])
    return [
        float(verify(list(answer), parsed)) if answer else None
        for parsed, answer in zip(found, answers, strict=True)
    ]


@lru_cache(maxsize=1024)
def _parse_answer(answer: str) -> tuple[Any, ...]:
    """The parsed answer; () when it is no mathematics.

    math-verify looks for LaTeX inside delimiters, so a bare expression is given some.
    """
    bare = not MARKED.search(answer) and not PROSE.search(answer)
    parsed = tuple(parse(f"\\boxed{{{answer}}}" if bare else answer))
    return () if all(isinstance(item, str) for item in parsed) else parsed
