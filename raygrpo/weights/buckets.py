"""Weights as buckets: runs of tensors that travel as flat byte arrays with a checksum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.errors import WeightsCorrupt
from raygrpo.types import ByteArray, Version
from raygrpo.weights.delta import checksum as checksum
from raygrpo.weights.types import BucketSpec, TensorSpec, WeightsManifest

BUCKET_BYTES = 64 * 2**20


def tensor_bytes(tensor: Tensor) -> ByteArray:
    """A tensor's bytes as a flat numpy view; a copy unless the tensor is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    view: ByteArray = flat.view(torch.uint8).numpy()
    return view


def new_bytes(num_bytes: int) -> ByteArray:
    """A new array."""
    return np.empty(num_bytes, np.uint8)


def make_buckets(
    tensors: Iterable[tuple[str, Tensor]],
    bucket_bytes: int = BUCKET_BYTES,
    take: Callable[[int], ByteArray] = new_bytes,
) -> Iterator[tuple[BucketSpec, ByteArray]]:
    """Packs named tensors in order into buckets of at most ``bucket_bytes``, or of one tensor.

    Each bucket is yielded when it is full, so that a sharded model is never gathered whole.
    ``take`` gives a bucket's memory: fresh memory costs as much as the copy into it.
    """
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > bucket_bytes:
            yield _pack(pending, take)
            pending, size = [], 0
        pending.append((name, tensor))
        size += num_bytes
    if pending:
        yield _pack(pending, take)


def make_version(
    version: Version, tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES
) -> tuple[WeightsManifest, list[ByteArray]]:
    """A whole version of these tensors: its manifest, without a probe, and its buckets."""
    specs, buckets = zip(*make_buckets(tensors, bucket_bytes), strict=True)
    return WeightsManifest(version=version, buckets=specs), list(buckets)


def _pack(
    tensors: list[tuple[str, Tensor]], take: Callable[[int], ByteArray]
) -> tuple[BucketSpec, ByteArray]:
    specs, offset = [], 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        specs.append(
            TensorSpec(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset_bytes=offset,
                num_bytes=num_bytes,
            )
        )
        offset += num_bytes
    data = take(offset)
    for spec, (_, tensor) in zip(specs, tensors, strict=True):
        data[spec.offset_bytes : spec.offset_bytes + spec.num_bytes] = tensor_bytes(tensor)
    return BucketSpec(tensors=tuple(specs), num_bytes=offset, checksum=checksum(data)), data


def unpack(spec: BucketSpec, data: ByteArray) -> Iterator[tuple[str, Tensor]]:
    """Yields a bucket's tensors as views into ``data``, after verifying size and checksum.

    Raises:
        WeightsCorrupt: other bytes were packed.
    """
    if data.nbytes != spec.num_bytes or checksum(data) != spec.checksum:
        raise WeightsCorrupt(
            f"bucket of {spec.tensors[0].name} is corrupt", "the weights are published again"
        )
    for tensor in spec.tensors:
        part = data[tensor.offset_bytes : tensor.offset_bytes + tensor.num_bytes]
        # torch warns about read-only arrays such as shared memory; nothing writes to these views.
        flat = (
            torch.frombuffer(part, dtype=torch.uint8) if part.flags.writeable else _readonly(part)
        )
        yield tensor.name, flat.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def _readonly(part: ByteArray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(part, dtype=torch.uint8)


def weight_targets(model: Any) -> dict[str, Tensor]:
    """The tensors of a full version: parameters (tied ones once) and saved buffers."""
    saved = model.state_dict(keep_vars=True)
    targets: dict[str, Tensor] = dict(model.named_parameters())
    targets.update((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    return targets
