"""A rank's part of a learner checkpoint: one file, written and read by that rank alone.

A file holds plain tensors and numbers, so that reading a file runs no code. Each rank may see the
directory on a disk of its own.
"""

from __future__ import annotations

import os
import pickle
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from raygrpo.errors import ConfigError, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The cut of a learner's state into shards; a checkpoint loads into the same cut only."""

    num_ranks: int
    zero_stage: int
    dtype: str


_NAME = re.compile(r"rank-(\d+)-of-(\d+)\.pt")


def shard_path(directory: Path, rank: int, num_ranks: int) -> Path:
    """The file of one rank."""
    return directory / f"rank-{rank}-of-{num_ranks}.pt"


def write_shard(directory: Path, rank: int, layout: Layout, state: Mapping[str, Any]) -> None:
    """Writes and fsyncs a rank's file.

    Raises:
        StorageError: the file cannot be written.
    """
    path = shard_path(directory, rank, layout.num_ranks)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            torch.save({"layout": asdict(layout), **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"cannot write {path}: {error}", "free space, or check permissions"
        ) from error


def read_shard(directory: Path, rank: int, layout: Layout) -> dict[str, Any]:
    """Reads a rank's file, after a check that its layout is ``layout``.

    Raises:
        ConfigError: the checkpoint has another number of ranks, ZeRO stage or dtype.
        StorageError: the file is missing or unreadable.
    """
    found = [name for name in _listing(directory) if _NAME.fullmatch(name)]
    if not found:
        raise StorageError(f"no learner checkpoint in {directory}")
    path = shard_path(directory, rank, layout.num_ranks)
    other = path if path.name in found else directory / sorted(found)[0]
    state = _read(other)
    saved = Layout(**state.pop("layout"))
    if saved != layout:
        raise ConfigError(
            f"the checkpoint in {directory} was saved with {_describe(saved)}, "
            f"the configuration asks for {_describe(layout)}",
            f"resume with {_describe(saved)}, or start a new run from its exported model",
        )
    if other != path:
        raise StorageError(f"{path} is missing, though {other.name} is there")
    return state


def _listing(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise StorageError(f"cannot read {directory}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StorageError(f"cannot read {path}: {error}", "resume from an older one") from error
    return state


def _describe(layout: Layout) -> str:
    return (
        f"learner.num_ranks: {layout.num_ranks}, learner.zero_stage: {layout.zero_stage}, "
        f"model.dtype: {layout.dtype}"
    )


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the random generators (torch, CUDA, Python, numpy), as plain values."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores the states that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
