"""Published LoRA adapters, and the whole weights that an adapter and its base model make.

A merged weight is ``W0 + scale * (B @ A)``, computed in fp32 and rounded once to the base's dtype.
Checkpoints (``model/``) and generators merge alike. The learner's own forward pass keeps adapter
and base apart, so in bfloat16 the two differ by that rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from raygrpo.config import RunConfig
from raygrpo.errors import InfraError
from raygrpo.models import DTYPES, load_model
from raygrpo.types import ByteArray
from raygrpo.weights.buckets import make_buckets, unpack, weight_targets
from raygrpo.weights.types import BucketSpec, WeightsManifest

# peft's names of an adapter's tensors, in peft's files and in our buckets.
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


def adapter_scale(lora: Mapping[str, Any], rank: int) -> float:
    """peft's factor of ``B @ A`` for this rank (rsLoRA: arXiv 2312.03732)."""
    alpha = float(lora.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if lora.get("use_rslora") else alpha / rank


def merged_weights(
    base: Iterable[tuple[str, Tensor]], adapter: Mapping[str, Tensor], lora: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors; tensors of adapted layers are merged with the adapter.

    Args:
        base: names and tensors as the model without adapter has them.
        adapter: A [r, in] and B [out, r] by peft's names.
        lora: ``learner.lora``.
    """
    for name, weight in base:
        module = PREFIX + name.removesuffix(".weight")
        if module + A not in adapter:
            yield name, weight
            continue
        down, up = adapter[module + A].float(), adapter[module + B].float()
        scale = adapter_scale(lora, down.shape[0])
        yield name, torch.addmm(weight.float(), up, down, alpha=scale).to(weight.dtype)


class AdapterBase:
    """The base weights beside an engine: they make a whole version of a published adapter.

    The base is read from ``model.path`` at the first adapter. Weights that the adapter leaves alone
    are packed once, and every version refers to the same arrays. So a version costs new memory for
    the adapter's layers only.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._base: dict[str, Tensor] = {}
        self._frozen: list[tuple[BucketSpec, ByteArray]] = []

    def full_version(
        self, manifest: WeightsManifest, buckets: Iterable[ByteArray]
    ) -> tuple[WeightsManifest, list[ByteArray]]:
        """The manifest and buckets of the merged model, with the adapter's version.

        Raises:
            InfraError: a bucket is corrupt, or the adapter is not of this model's layers.
        """
        pairs = zip(manifest.buckets, buckets, strict=True)
        adapter = {name: tensor for spec, data in pairs for name, tensor in unpack(spec, data)}
        names = {n.removeprefix(PREFIX).removesuffix(A) + ".weight" for n in adapter if A in n}
        if not self._base:
            self._read(names)
        if names != set(self._base) or len(adapter) != 2 * len(names):
            raise InfraError("a published adapter is of other layers than the model's")
        merged = merged_weights(self._base.items(), adapter, self._config.learner.lora)
        whole = [*self._frozen, *make_buckets(merged)]
        specs, arrays = zip(*whole, strict=True)
        return WeightsManifest(version=manifest.version, buckets=specs), list(arrays)

    def _read(self, names: Set[str]) -> None:
        section = self._config.model
        model = load_model(section, seed=self._config.seed, dtype=DTYPES[section.dtype])
        held = {name: tensor.detach() for name, tensor in weight_targets(model).items()}
        self._base = {name: tensor for name, tensor in held.items() if name in names}
        frozen = ((name, tensor) for name, tensor in held.items() if name not in names)
        self._frozen = list(make_buckets(frozen))
