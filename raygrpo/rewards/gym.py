"""The built-in reward `reasoning_gym`: the score of a reasoning-gym task's own verifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from reasoning_gym.factory import DATASETS, get_score_answer_fn
from reasoning_gym.utils import extract_answer

from raygrpo.errors import nearest
from raygrpo.rewards.text import LogExtra, completion_text, report_answers

Scorer = Callable[[str, dict[str, Any]], float]

# Verifiers of reasoning-gym 0.1.25 that parse the answer without guarding against text that does
# not parse; for those, such text is a wrong answer.
UNGUARDED: dict[str, tuple[type[Exception], ...]] = {
    "boxnet": (TypeError, AttributeError),
    "game_of_life": (KeyError, TypeError),
    "prime_factorization": (ValueError,),
}


def reasoning_gym(
    completions: Sequence[Any],
    question: Sequence[str],
    metadata: Sequence[Any],
    answer: Sequence[str | None] | None = None,
    task: str | None = None,
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float]:
    """The task's ``score_answer`` of the text in the last <answer> tag, else of the whole text.

    ``metadata`` is a dict or its JSON. With ``task`` None the row's metadata name the task
    (``source_dataset``), so that mixed tasks can be scored. Some tasks give partial credit.
    """
    answers = answer if answer is not None else [None] * len(completions)
    texts = []
    for completion in completions:
        text = completion_text(completion)
        tagged = extract_answer(text)
        texts.append(text.strip() if tagged is None else tagged)
    report_answers(log_extra, texts)
    scores = []
    for text, asked, expected, about in zip(texts, question, answers, metadata, strict=True):
        about = json.loads(about) if isinstance(about, str) else about
        entry = {"question": asked, "answer": expected, "metadata": about}
        scores.append(score(task or about["source_dataset"], text, entry))
    return scores


def score(task: str, text: str, entry: dict[str, Any]) -> float:
    """The task's score of one text.

    Raises:
        ValueError: no such task.
        Exception: the verifier's own, unless the task is known to raise on text that is no answer.
    """
    scorer = _scorer(task)
    try:
        return float(scorer(text, entry))
    except UNGUARDED.get(task, ()):
        if entry["answer"] is not None:
            # Fails as well where the row, not the text, is at fault: that must not pass as 0.
            scorer(entry["answer"], entry)
        return 0.0


@lru_cache
def _scorer(task: str) -> Scorer:
    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}; {nearest(task, DATASETS)}")
    scorer: Scorer = get_score_answer_fn(task)
    return scorer
