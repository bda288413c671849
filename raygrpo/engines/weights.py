"""Copies a published version into a model's tensors, in place, after checking all there is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from raygrpo.errors import InfraError
from raygrpo.types import ByteArray, TensorSpec, Version, WeightsManifest
from raygrpo.weights.buckets import unpack


def weight_targets(model: Any) -> dict[str, Tensor]:
    """The tensors that a full version consists of: parameters (tied ones once), saved buffers."""
    saved = model.state_dict(keep_vars=True)
    targets: dict[str, Tensor] = dict(model.named_parameters())
    targets.update((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    return targets


def check_manifest(
    targets: Mapping[str, Tensor], manifest: WeightsManifest, held: Version | None
) -> None:
    """Refuses a version that does not fit the model or what it holds, before anything is copied.

    Raises:
        InfraError: older than the held version, a kind or base that cannot be applied, or tensors
            of unknown names, other dtypes or shapes, or missing from a full version.
    """
    if held is not None and manifest.version < held:
        raise InfraError(f"version {manifest.version} is older than {held}, which is loaded")
    if manifest.kind == "adapter" or (manifest.kind == "delta" and manifest.base_version != held):
        raise InfraError(
            f"{manifest.kind} on {manifest.base_version} cannot be applied to {held}",
            "publish a full version",
        )
    specs = [spec for bucket in manifest.buckets for spec in bucket.tensors]
    for spec in specs:
        _check_tensor(targets, spec)
    names = {spec.name for spec in specs}
    if len(names) != len(specs):
        raise InfraError(f"version {manifest.version} has a tensor twice")
    if manifest.kind == "full" and (missing := sorted(set(targets) - names)):
        raise InfraError(
            f"version {manifest.version} lacks {len(missing)} of {len(targets)} tensors, "
            f"the first being {missing[0]}"
        )


def _check_tensor(targets: Mapping[str, Tensor], spec: TensorSpec) -> None:
    if spec.name not in targets:
        raise InfraError(f"the model has no tensor {spec.name}", "publish from the same model")
    target = targets[spec.name]
    dtype = str(target.dtype).removeprefix("torch.")
    if spec.dtype != dtype or spec.shape != tuple(target.shape):
        raise InfraError(
            f"{spec.name} is published as {spec.dtype} {list(spec.shape)}, "
            f"but held as {dtype} {list(target.shape)}",
            "publish in model.dtype, from the same model",
        )
    if spec.num_bytes != math.prod(spec.shape) * target.element_size():
        raise InfraError(f"{spec.name} has a wrong number of bytes")


def copy_buckets(
    targets: Mapping[str, Tensor], manifest: WeightsManifest, buckets: Iterable[ByteArray]
) -> None:
    """Copies bucket by bucket, each verified as a whole before the first of its tensors is copied.

    Raises:
        InfraError: a corrupt bucket, or too few or too many; earlier buckets are copied by then.
    """
    arrays = iter(buckets)
    with torch.no_grad():
        for number, spec in enumerate(manifest.buckets):
            data = next(arrays, None)
            if data is None:
                raise InfraError(f"{number} of {len(manifest.buckets)} buckets came")
            for name, tensor in unpack(spec, data):
                targets[name].copy_(tensor)
    if next(arrays, None) is not None:
        raise InfraError(f"more than {len(manifest.buckets)} buckets came")
