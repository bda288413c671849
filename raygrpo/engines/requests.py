"""What every engine checks of a request before it takes it."""

from __future__ import annotations

from raygrpo.errors import DataError, InfraError
from raygrpo.types import GroupRequest


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
