"""The face of an inference engine: generation on one machine, without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from raygrpo.types import ByteArray, Completion, FloatArray, Group, GroupRequest, Stream, Version
from raygrpo.weights.types import WeightsManifest


class Engine(Protocol):
    """Takes group requests, returns finished groups; weights may change between two steps.

    One thread owns an engine; only `stage_weights` and `score` may run on others. A request waits
    in the engine until the engine holds ``request.min_version`` or a newer version.
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
        """Queues a group. Raises DataError if prompt and completion can never fit.

        The request's ``partials`` keep their tokens, logprobs and versions. Aborted ones go on with
        the random numbers of their next positions. The finished group's request has no partials.
        """

    def step(self) -> list[Group]:
        """Decodes one token of every running completion; returns the groups that finished."""

    def stage_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Verifies a whole version and makes it ready beside the one in use.

        It may run on another thread while steps go on: it changes nothing that decoding reads. The
        engine may keep the arrays until a later version is committed.

        Raises:
            InfraError: the version does not fit, is older, or is corrupt; nothing is staged.
        """

    def commit_weights(self) -> None:
        """Puts the staged version into use, quickly; between two steps, on the engine's thread."""

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Stages and commits a version; between two steps."""

    def abort(self, stream: Stream, group_id: int) -> list[Completion]:
        """Drops a group; returns its completions so far, in order.

        Another engine can go on with them (`GroupRequest.partials`). The list is empty if the group
        had not begun or is gone.
        """

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        """Logprobs [T] of each token given those before it, in nats; index 0 is 0.

        May run on another thread while steps go on, as long as the weights stay.
        """

    def sleep(self) -> None:
        """Frees memory for another process until `wake`; no group may be unfinished.

        An engine that gives its weights up holds no version until a load after `wake`.
        """

    def wake(self) -> None:
        """Takes the memory back; an engine that is awake stays as it is."""

    def close(self) -> None:
        """Frees the engine's memory and processes."""
