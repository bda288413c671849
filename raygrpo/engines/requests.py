"""The groups in an engine: which may enter, which wait for room or weights, which have ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from raygrpo.errors import DataError, InfraError, NumericError
from raygrpo.types import Completion, Group, GroupRequest, Stream, Version

Key = tuple[Stream, int]


@dataclass(slots=True)
class Running:
    """A group being decoded; ``serial`` is its number in the engine."""

    request: GroupRequest
    serial: int
    started: float

    @property
    def key(self) -> Key:
        """The group's identity in the engine."""
        return self.request.stream, self.request.group_id

    def group(self, completions: Sequence[Completion]) -> Group:
        """The finished group."""
        return Group(
            request=replace(self.request, partials=()),
            completions=tuple(completions),
            generate_s=time.monotonic() - self.started,
        )


R = TypeVar("R", bound=Running)


class Admission(Generic[R]):
    """Which groups wait, run and have finished in one engine.

    A group waits until the engine holds the version that the group asks for, and has room. Groups
    enter whole, in order of submission. ``max_positions`` and ``vocab_size`` are the model's.

    Attributes:
        running: the groups being decoded, by serial number.
    """

    def __init__(self, *, max_positions: int | None, vocab_size: int) -> None:
        self._max_positions, self._vocab_size = max_positions, vocab_size
        self._waiting: dict[Key, GroupRequest] = {}
        self._finished: list[Group] = []
        self._serials = itertools.count()
        self.running: dict[int, R] = {}

    @property
    def num_unfinished(self) -> int:
        """Groups submitted and not yet returned or dropped."""
        return len(self._waiting) + len(self.running) + len(self._finished)

    @property
    def has_finished(self) -> bool:
        """Whether finished groups wait to be taken."""
        return bool(self._finished)

    def can_step(self, version: Version | None) -> bool:
        """Whether a step of an engine that holds ``version`` would make progress."""
        if version is None:
            return False
        return bool(self.running or self._finished) or any(
            request.min_version <= version for request in self._waiting.values()
        )

    def submit(self, request: GroupRequest) -> None:
        """Queues a group.

        Raises:
            DataError: the prompt and ``max_tokens`` exceed the positions, or the prompt has ids
                that the model lacks.
            InfraError: the group is here already.
        """
        key: Key = (request.stream, request.group_id)
        name, prompt = f"group {key[0]}/{key[1]}", request.prompt.token_ids
        if key in self._waiting or any(group.key == key for group in self.running.values()):
            raise InfraError(f"{name} is being generated already", "abort it first")
        positions = prompt.size + request.sampling.max_tokens
        if self._max_positions is not None and positions > self._max_positions:
            raise DataError(
                f"{name}: a prompt of {prompt.size} tokens and max_tokens "
                f"{request.sampling.max_tokens} exceed the model's {self._max_positions} positions",
                "lower sampling.max_tokens or data.max_prompt_length",
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= self._vocab_size:
            raise DataError(
                f"{name}: the prompt has token ids outside the model's {self._vocab_size}",
                "use the model's own tokenizer",
            )
        self._waiting[key] = request

    def admit(
        self, version: Version, fits: Callable[[int], bool], start: Callable[[GroupRequest, int], R]
    ) -> Iterator[R]:
        """Starts waiting groups in order, while there is room for their completions.

        ``fits`` says whether a number of completions has room; ``start`` makes a running group of a
        request and a serial number.
        """
        for key, request in list(self._waiting.items()):
            if request.min_version > version:
                continue
            if not fits(len(request.unfinished)):
                return
            del self._waiting[key]
            running = start(request, next(self._serials))
            self.running[running.serial] = running
            yield running

    def finish(self, running: R, completions: Sequence[Completion]) -> None:
        """Ends a running group."""
        del self.running[running.serial]
        self._finished.append(running.group(completions))

    def take_finished(self) -> list[Group]:
        """The groups that finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def drop(self, stream: Stream, group_id: int) -> R | None:
        """Drops a waiting group; returns the group if it runs, which goes on."""
        key: Key = (stream, group_id)
        self._waiting.pop(key, None)
        return next((group for group in self.running.values() if group.key == key), None)

    def clear(self) -> None:
        """Drops all groups."""
        self._waiting, self.running, self._finished = {}, {}, []


def not_finite(groups: Sequence[Running], version: Version | None) -> NumericError:
    """The error of an engine whose logprobs are not finite for these groups."""
    names = ", ".join(f"{stream}/{group_id}" for stream, group_id in (g.key for g in groups))
    return NumericError(
        f"group {names}: logprobs are not finite under version {version}",
        "look at the gradient norms of the steps before; lower the learning rate",
    )
