"""Versions of the weights: what a published version consists of, and its proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from raygrpo.types import Version

WholeKind = Literal["full", "adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor's place in a bucket: ``offset_bytes`` from its start; ``dtype`` in torch's names."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSpec:
    """A run of tensors that travels as one byte array.

    ``num_bytes`` and ``checksum`` (xxh3_64) are of the tensors' bytes, however they travel:
    ``encoded_bytes`` is the size of the delta in their stead, None where they go as they are.
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
    """What the learner's weights make of a fixed sequence: ``logprobs`` [T] in nats, index 0 is 0.

    They are of the policy at the run's sampling temperature.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError("token_ids and logprobs of a probe differ in length")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsManifest:
    """What a published version consists of.

    A ``delta`` needs ``base_version``, whose buckets have the same tensors; the others are whole.
    """

    version: Version
    kind: Literal["full", "delta", "adapter"]
    base_version: Version | None
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
