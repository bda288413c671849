"""A model directory that transformers loads, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raygrpo.config import ModelSection
from raygrpo.errors import StorageError
from raygrpo.models import load_tokenizer

SHARD_BYTES = 4 * 2**30


def write_model(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    model: Any,
    section: ModelSection,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes safetensors shards, configuration, generation configuration and tokenizer.

    Holds one shard in memory at a time. ``model`` gives the configurations only.

    Raises:
        StorageError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shards = _write_shards(directory, tensors, shard_bytes)
        _name_shards(directory, shards)
        model.config.save_pretrained(directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
        load_tokenizer(section).save_pretrained(directory)
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"cannot write the model to {directory}: {error}") from error


def _write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> list[dict[str, int]]:
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        path = directory / f"shard-{len(shards)}.tmp"
        save_file(pending, path, metadata={"format": "pt"})
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in pending.items()}
        shards.append(sizes)
        pending.clear()

    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > shard_bytes:
            flush()
            size = 0
        # A copy: the learner may reuse the memory behind the tensor it yielded.
        pending[name] = tensor.detach().cpu().contiguous().clone()
        size += num_bytes
    flush()
    return shards


def _name_shards(directory: Path, shards: list[dict[str, int]]) -> None:
    if len(shards) == 1:
        (directory / "shard-0.tmp").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, sizes in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{index}.tmp").rename(directory / file)
        weight_map |= dict.fromkeys(sizes, file)
    total = sum(sum(sizes.values()) for sizes in shards)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
