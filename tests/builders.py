"""Small valid values of the project's types, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.types import (
    Completion,
    Finish,
    FinishedGroup,
    Group,
    GroupRequest,
    GroupSummary,
    Prompt,
    Sampling,
    Score,
    Version,
    summarise,
)

# The smallest configuration; nothing is loaded from these names.
SMALLEST: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "d"}}


def config(**sections: Any) -> RunConfig:
    """The smallest configuration with these sections, or keys beside them."""
    return load_config({**SMALLEST, **sections})


def prompt(tokens: Sequence[int] = (1, 2, 3), name: str = "p") -> Prompt:
    return Prompt(id=name, token_ids=np.array(tokens, np.int32), text="?")


def request(
    group_id: int = 0,
    *,
    step: int = 0,
    num_completions: int = 2,
    tokens: Sequence[int] = (1, 2, 3),
    max_tokens: int = 8,
    **sampling: object,
) -> GroupRequest:
    return GroupRequest(
        stream="train",
        group_id=group_id,
        prompt=prompt(tokens),
        seed=0,
        sampling=Sampling(
            num_completions=num_completions,
            max_tokens=max_tokens,
            **sampling,  # type: ignore[arg-type]
        ),
        min_version=Version(1, step),
    )


def completion(
    tokens: Sequence[int],
    logprobs: Sequence[float] | None = None,
    mask: Sequence[bool] | None = None,
    finish: Finish = "stop",
    step: int = 0,
    text: str = "x",
) -> Completion:
    return Completion(
        token_ids=np.array(tokens, np.int32),
        logprobs=np.array(logprobs if logprobs is not None else [-0.5] * len(tokens), np.float32),
        loss_mask=np.array(mask if mask is not None else [True] * len(tokens), np.bool_),
        text=text,
        finish=finish,
        version_runs=((Version(1, step), len(tokens)),),
    )


def group(order: GroupRequest, completions: Sequence[Completion]) -> Group:
    return Group(request=order, completions=tuple(completions))


def written(
    texts: Sequence[str], columns: dict[str, Any] | None = None, chat: bool = False
) -> Group:
    """A group of these texts, each of as many tokens as letters, after ``1 + 1 =``."""
    asked = "1 + 1 ="
    question = replace(
        prompt(),
        text=None if chat else asked,
        messages=({"role": "user", "content": asked},) if chat else None,
        columns=columns or {},
    )
    order = replace(request(num_completions=len(texts)), prompt=question)
    return group(order, [completion(range(max(1, len(text))), text=text) for text in texts])


def score(value: float | None, error: str | None = None) -> Score:
    return Score(value=value, parts={"r": value}, error=error)


def summary(
    group_id: int,
    rewards: Sequence[float | str | None],
    *,
    lengths: Sequence[int] | None = None,
    finishes: Sequence[Finish] | None = None,
    step: int = 0,
    prompt_length: int = 3,
) -> GroupSummary:
    """A finished group; a reward given as text is an errored score."""
    count = len(rewards)
    order = request(group_id, num_completions=count, tokens=[1] * prompt_length)
    shapes = zip(lengths or [4] * count, finishes or ["stop"] * count, strict=True)
    done = [completion([1] * length, finish=finish, step=step) for length, finish in shapes]
    scores = [score(None, r) if isinstance(r, str) else score(r) for r in rewards]
    return summarise(group(order, done), scores)


def finished(group_id: int, rewards: Sequence[float | str | None], step: int = 0) -> FinishedGroup:
    """A group that teaches where its rewards differ."""
    values = {reward for reward in rewards if isinstance(reward, float | int)}
    return FinishedGroup(
        summary=summary(group_id, rewards, step=step),
        payload=f"ref-{group_id}",
        teaches=len(values) > 1,
    )
