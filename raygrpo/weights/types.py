"""A published version of the weights: its tensors, its buckets, its proof, its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from raygrpo.types import Version

WholeKind = Literal["full", "adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor's place in a bucket.

    Example: ``model.norm.weight``, ``bfloat16``, shape (576,), offset_bytes 4096, num_bytes 1152.
    ``dtype`` is torch's name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSpec:
    """A run of tensors that travels as one byte array.

    Attributes:
        num_bytes: of the tensors, also if a delta travels; say 67108864.
        checksum: xxh3_64 of the tensors' bytes.
        encoded_bytes: the size of the delta, say 300000; None if the bucket travels whole.
    """

    tensors: tuple[TensorSpec, ...]
    num_bytes: int
    checksum: int
    encoded_bytes: int | None = None

    @property
    def sent_bytes(self) -> int:
        """Size of the array that travels."""
        return self.num_bytes if self.encoded_bytes is None else self.encoded_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The learner's logprobs [T] of a fixed sequence, in nats, at the run's temperature.

    Example: token_ids (17, 4, 90), logprobs (0.0, -3.2, -7.9). The first token has none, so 0.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError("token_ids and logprobs of a probe differ in length")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsManifest:
    """The contents of a published version.

    A ``delta`` needs ``base_version``, whose buckets have the same tensors. The other kinds are
    whole. Example: version (1, 8), kind ``delta``, base_version (1, 7), 5 buckets.
    """

    version: Version
    kind: Literal["full", "delta", "adapter"] = "full"
    base_version: Version | None = None
    buckets: tuple[BucketSpec, ...]
    probe: Probe | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(bucket.num_bytes for bucket in self.buckets)

    @property
    def sent_bytes(self) -> int:
        """Size of all arrays that travel."""
        return sum(bucket.sent_bytes for bucket in self.buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """A finished publish.

    Attributes:
        num_bytes: what a generator pulls that holds the version before.
        changed_frac: the share of elements whose bits changed; None without a version before.
        broken: generators that a direct transfer may have left half-loaded, with the reason, such
            as ``{"generator-1/4711": "receive: no answer"}``.
    """

    version: Version
    kind: Literal["full", "delta", "adapter"]
    num_bytes: int
    full_bytes: int
    changed_frac: float | None
    broken: Mapping[str, str] = field(default_factory=dict)
