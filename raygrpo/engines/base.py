"""What an inference engine is: one machine's generation, without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from raygrpo.types import ByteArray, Completion, FloatArray, Group, GroupRequest, Stream, Version
from raygrpo.weights.types import WeightsManifest


class Engine(Protocol):
    """Takes group requests, yields finished groups; weights may change between two steps.

    One thread owns an engine, `stage_weights` and `score` excepted. A request waits inside the
    engine until the engine holds ``request.min_version`` or a newer version.
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
        """Queues a group. Raises DataError when it can never fit (prompt plus completion).

        Its ``partials`` keep their tokens, logprobs and versions; those that were aborted go on
        with the random numbers of their next positions. The finished group's request has none.
        """

    def step(self) -> list[Group]:
        """Decodes one token of every running completion; returns the groups that finished."""

    def stage_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Verifies a whole version and makes it ready beside the one in use.

        The one method that may run on another thread while steps go on: nothing that decoding reads
        changes. The engine may keep the arrays in use until a later version is committed.

        Raises:
            InfraError: a version that does not fit, is older, or is corrupt; nothing is staged.
        """

    def commit_weights(self) -> None:
        """Puts the staged version into use, quickly; between two steps, on the engine's thread."""

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Stages and commits a version; between two steps."""

    def abort(self, stream: Stream, group_id: int) -> list[Completion]:
        """Drops a group; returns its completions so far, in order, for another engine to go on with
        (`GroupRequest.partials`): all of them, or none if it had not begun or is gone."""

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        """Logprobs [T] of each token given those before it, in nats; index 0 is 0.

        May run on another thread while steps go on, as long as the weights stay.
        """

    def sleep(self) -> None:
        """Frees what memory it can for another process, until `wake`; only with nothing unfinished.

        An engine whose weights do not survive it holds no version until one is loaded after `wake`.
        """

    def wake(self) -> None:
        """Takes the memory back; nothing happens to an engine that is awake."""

    def close(self) -> None:
        """Frees what the engine holds."""
