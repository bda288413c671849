"""The values that cross between a scorer, its reward functions and the trainer.

The call follows TRL: ``f(prompts=, completions=, completion_ids=, trainer_state=, log_extra=,
log_metric=, **columns) -> list[float | None]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raygrpo.types import Group, Score

RESERVED_COLUMNS = frozenset(
    {
        "prompt",
        "prompts",
        "completion",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Progress that reward functions may read, under TRL's attribute names.

    ``global_step`` counts finished steps of ``max_steps``; ``epoch`` is in passes over the data.
    """

    global_step: int
    max_steps: int
    epoch: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The values that a child needs to load its function.

    ``pickled`` (cloudpickle) is a function passed in Python; otherwise ``func`` says where the
    function is. ``paths`` joins the module search path. Deadlines are in seconds.
    """

    name: str
    func: str
    pickled: bytes | None
    params: Mapping[str, Any]
    paths: tuple[str, ...]
    timeout_s: float
    start_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One group for a reward function: its row, and its completions [G]."""

    prompt: Any
    columns: Mapping[str, Any]
    completions: Sequence[Any]
    completion_ids: Sequence[list[int]]
    trainer_state: TrainerState


def make_call(group: Group, trainer_state: TrainerState) -> Call:
    """A group as rewards see it: messages for prompts that are messages, else text."""
    prompt = group.request.prompt
    shown: Any = prompt.text
    completions: list[Any] = [completion.text for completion in group.completions]
    if prompt.messages is not None:
        shown = [dict(message) for message in prompt.messages]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    return Call(
        prompt=shown,
        columns={k: v for k, v in prompt.columns.items() if k not in RESERVED_COLUMNS},
        completions=completions,
        completion_ids=[completion.token_ids.tolist() for completion in group.completions],
        trainer_state=trainer_state,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer of one reward function for one group.

    ``parts`` [G] and ``errors`` [G]: a completion's value, or None with or without an error. When
    the call failed as a whole, every completion carries the error and ``traceback`` is set.
    ``seconds`` is the wall time of the call.
    """

    parts: tuple[float | None, ...]
    errors: tuple[str | None, ...]
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extras: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    traceback: str | None = None
    seconds: float = 0.0

    @staticmethod
    def failed(size: int, error: str, traceback: str) -> Reply:
        """The reply of a call that failed as a whole."""
        return Reply(parts=(None,) * size, errors=(error,) * size, traceback=traceback)


class RewardBackend(Protocol):
    """A place that computes a reward: a child process, or an actor. Calls are made in order."""

    name: str

    def start(self) -> None:
        """Makes the backend ready, unless it is."""

    def call(self, call: Call) -> Reply:
        """Scores a group; a failing reward gives a reply too."""

    def close(self) -> None:
        """Ends the backend; a call under way fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """The scores [G] of a group and what its reward functions reported.

    ``metrics`` are the values given to ``log_metric``, in order of the rewards; ``extras`` the
    columns [G] given to ``log_extra``; ``traceback`` the first one, None when nothing failed;
    ``reward_s`` the wall time of each reward by name, in seconds.
    """

    scores: tuple[Score, ...]
    metrics: Mapping[str, tuple[float, ...]]
    extras: Mapping[str, tuple[Any, ...]]
    traceback: str | None
    reward_s: Mapping[str, float]
