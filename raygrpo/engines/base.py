"""What an inference engine is: one machine's generation, without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from raygrpo.types import (
    ByteArray,
    Completion,
    FloatArray,
    Group,
    GroupRequest,
    Stream,
    Version,
    WeightsManifest,
)


class Engine(Protocol):
    """Takes group requests, yields finished groups; weights may change between two steps.

    Not thread-safe: one thread owns an engine. A request waits inside the engine until the engine
    holds ``request.min_version`` or a newer version.
    """

    @property
    def version(self) -> Version | None:
        """The version of the weights held; None before the first load."""

    @property
    def num_unfinished(self) -> int:
        """Groups submitted and not yet returned or aborted."""

    @property
    def can_step(self) -> bool:
        """Whether a step would make progress (False while all requests wait for newer weights)."""

    def submit(self, request: GroupRequest) -> None:
        """Queues a group. Raises DataError when it can never fit (prompt plus completion)."""

    def step(self) -> list[Group]:
        """Decodes one token of every running completion; returns the groups that finished."""

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Loads a version bucket by bucket, after verifying each; legal between steps."""

    def abort(self, stream: Stream, group_id: int) -> list[Completion]:
        """Drops a group; returns its completions so far, none if it had not begun or is gone."""

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        """Logprobs [T] of each token given those before it, in nats; index 0 is 0."""

    def close(self) -> None:
        """Frees what the engine holds."""
