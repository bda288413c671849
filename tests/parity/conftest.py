"""Fixtures of the comparisons with other implementations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import Kind, save_tiny_model

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "gemma3")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind, which tests only read."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def model(models: dict[str, Path]) -> Path:
    """A model with tied embeddings."""
    return models["qwen2"]
