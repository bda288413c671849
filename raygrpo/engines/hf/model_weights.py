"""A model's tensors: a version is staged beside the one in use, then swapped in.

`ModelWeights.stage` may run on another thread while the model computes. It verifies every bucket
and touches nothing that the model reads. `ModelWeights.commit` re-points the tensors, which takes
milliseconds for a model of any size.

On a CPU the tensors become views of the staged byte arrays, without a copy. A tensor that does not
start at a multiple of 64 bytes is copied: kernels then see the same alignment, and give the same
bits, however the version arrived. On a GPU a second set of tensors is filled on a stream of its
own, and the two sets change places.

Linear weights are packed at staging or, with ``pack_later``, by `ModelWeights.pack` between decode
steps. Until then the kernels take the plain weights, a little slower, and may round sums in another
way. So deterministic engines pack at staging.

Memory: at most twice the weights, and while a version is staged twice the packed linear weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raygrpo.engines.hf.linear import PackedLinear, can_pack, use_packed_linears
from raygrpo.errors import InfraError
from raygrpo.types import ByteArray, Version
from raygrpo.weights.buckets import unpack, weight_targets
from raygrpo.weights.types import TensorSpec, WeightsManifest

ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Staged:
    """A verified version that waits for its commit."""

    version: Version
    tensors: Mapping[str, Tensor]
    packed: list[Tensor]


class ModelWeights:
    """The tensors of one model on one device, and the version that they are of.

    Linear layers become `PackedLinear` where the CPU gains by it.

    Attributes:
        version: of the weights in use; None until the first commit, unless it was given.
        targets: the tensors by name: parameters (tied ones once) and saved buffers.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        *,
        num_rows: int,
        version: Version | None,
        pack_later: bool = False,
    ) -> None:
        self.version = version
        self._pack_later = pack_later
        self._unpacked: deque[PackedLinear] = deque()
        self._device, self._num_rows = device, num_rows
        self.linears: list[PackedLinear] = []
        if can_pack(device, model.dtype):
            self.linears = use_packed_linears(model)
            for linear in self.linears:
                linear.packed = linear.pack(linear.weight, num_rows)
        self.targets = weight_targets(model)
        names = {id(tensor): name for name, tensor in self.targets.items()}
        self._packed_names = [names[id(linear.weight)] for linear in self.linears]
        self._spare: dict[str, Tensor] = {}
        self._staged: _Staged | None = None

    def stage(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Verifies a version's buckets and makes the version ready; the one in use stays.

        An earlier staged version is dropped. On a CPU the arrays belong to these weights until a
        later version is committed: nobody may write to them.

        Raises:
            InfraError: the version does not fit the model, is older than the one in use, or a
                bucket is corrupt or missing; nothing is staged then.
        """
        self._staged = None
        check_manifest(self.targets, manifest, self.version)
        with torch.no_grad():
            views = unpack_all(manifest, buckets)
            tensors = self._on_device(views)
            packed = (
                [] if self._pack_later else [self._pack(tensors[n]) for n in self._packed_names]
            )
        self._staged = _Staged(version=manifest.version, tensors=tensors, packed=packed)

    def commit(self) -> Version:
        """Puts the staged version into use, while the model computes nothing.

        Raises:
            InfraError: nothing is staged, or the staged version is older than the one in use.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            raise InfraError("no version is staged", "stage one first")
        _refuse_older(staged.version, self.version)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._spare = {name: target.data for name, target in self.targets.items()}
        for name, tensor in staged.tensors.items():
            self.targets[name].data = tensor
        for place, linear in enumerate(self.linears):
            linear.packed = None if self._pack_later else staged.packed[place]
        if self._pack_later:
            self._unpacked = deque(self.linears)
        self.version = staged.version
        return staged.version

    @torch.no_grad()
    def pack(self, share: float = 1.0) -> None:
        """Packs unpacked linear weights of the version in use, about ``share`` of all bytes.

        It runs on the thread that computes: another thread would take its cores at wrong moments.
        """
        if not self._unpacked:
            return
        room = share * sum(linear.weight.nbytes for linear in self.linears)
        while self._unpacked and room > 0:
            linear = self._unpacked[0]
            linear.packed = self._pack(linear.weight)
            room -= linear.weight.nbytes
            self._unpacked.popleft()

    def move(self, device: torch.device) -> None:
        """Moves the weights in use; frees the room for the next version until that comes."""
        self._spare = {}
        for target in self.targets.values():
            target.data = target.data.to(device)

    def _pack(self, weight: Tensor) -> Tensor:
        return PackedLinear.pack(weight, self._num_rows)

    def _on_device(self, views: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self._device.type != "cuda":
            return {name: _aligned(view) for name, view in views.items()}
        if not self._spare:
            self._spare = {name: torch.empty_like(t.data) for name, t in self.targets.items()}
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(stream):
            for name, view in views.items():
                self._spare[name].copy_(view, non_blocking=True)
        stream.synchronize()
        return self._spare


def check_manifest(
    targets: Mapping[str, Tensor], manifest: WeightsManifest, held: Version | None
) -> None:
    """Refuses a version that does not fit the model or the held version, before reading it.

    An engine gets whole versions only: `raygrpo.weights.replica` applies deltas before.

    Raises:
        InfraError: older than the held version, an adapter, or tensors of unknown names, other
            dtypes or shapes, twice, or missing.
    """
    _refuse_older(manifest.version, held)
    if manifest.kind == "adapter":
        raise InfraError("an adapter cannot be loaded", "publish a full version")
    specs = [spec for bucket in manifest.buckets for spec in bucket.tensors]
    for spec in specs:
        _check_tensor(targets, spec)
    names = {spec.name for spec in specs}
    if len(names) != len(specs):
        raise InfraError(f"version {manifest.version} has a tensor twice")
    if missing := sorted(set(targets) - names):
        raise InfraError(
            f"version {manifest.version} lacks {len(missing)} of {len(targets)} tensors, "
            f"the first being {missing[0]}"
        )


def _refuse_older(version: Version, held: Version | None) -> None:
    if held is not None and version < held:
        raise InfraError(f"version {version} is older than {held}, which is loaded")


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


def unpack_all(manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> dict[str, Tensor]:
    """Views of all tensors, every bucket verified."""
    arrays = iter(buckets)
    views: dict[str, Tensor] = {}
    for number, spec in enumerate(manifest.buckets):
        data = next(arrays, None)
        if data is None:
            raise InfraError(f"{number} of {len(manifest.buckets)} buckets came")
        views.update(unpack(spec, data))
    if next(arrays, None) is not None:
        raise InfraError(f"more than {len(manifest.buckets)} buckets came")
    return views


def _aligned(view: Tensor) -> Tensor:
    return view if view.data_ptr() % ALIGNMENT == 0 else view.clone()
