"""A request in an engine: what is checked before it is taken, and what is kept of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from raygrpo.errors import DataError, InfraError
from raygrpo.types import Completion, Group, GroupRequest, Stream

Key = tuple[Stream, int]


def check_request(
    request: GroupRequest, *, busy: bool, max_positions: int | None, vocab_size: int
) -> None:
    """Refuses what an engine could never finish; ``busy``: the group is there already.

    Raises:
        DataError: the prompt and ``max_tokens`` exceed the positions, or the prompt has ids that
            the model lacks.
        InfraError: the group is there already.
    """
    name, prompt = f"group {request.stream}/{request.group_id}", request.prompt.token_ids
    if busy:
        raise InfraError(f"{name} is being generated already", "abort it first")
    if max_positions is not None and prompt.size + request.sampling.max_tokens > max_positions:
        raise DataError(
            f"{name}: a prompt of {prompt.size} tokens and max_tokens "
            f"{request.sampling.max_tokens} exceed the model's {max_positions} positions",
            "lower sampling.max_tokens or data.max_prompt_length",
        )
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size:
        raise DataError(
            f"{name}: the prompt has token ids outside the model's {vocab_size}",
            "use the model's own tokenizer",
        )


@dataclass(slots=True)
class Running:
    """A group being decoded, with its completions that have ended."""

    request: GroupRequest
    started: float
    ended: dict[int, Completion] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The group's identity in the engine."""
        return self.request.stream, self.request.group_id

    def finished(self) -> Group:
        """The group, once all of its completions have ended."""
        return Group(
            request=replace(self.request, partials=()),
            completions=tuple(self.ended[index] for index in sorted(self.ended)),
            generate_s=time.monotonic() - self.started,
        )
