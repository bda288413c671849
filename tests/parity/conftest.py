"""Fixtures of the comparisons with other implementations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny import Kind, save_tiny_model

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "gemma3")


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directories of tiny models, each made once; tests only read them."""

    @cache
    def path(kind: Kind = "llama", seed: int = 0) -> Path:
        return save_tiny_model(tmp_path_factory.mktemp(kind), kind, seed)

    return path


@pytest.fixture(scope="session")
def models(paths: Callable[..., Path]) -> dict[str, Path]:
    """A tiny model of each kind."""
    return {kind: paths(kind) for kind in KINDS}


@pytest.fixture(params=[0, 10**9], ids=["shared", "copied"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test runs once with each prompt in a slot, and once with each in its rows."""
    monkeypatch.setattr("raygrpo.engines.hf.shared_prompts.SHARING_PAYS", request.param)


@pytest.fixture(scope="session")
def model(models: dict[str, Path]) -> Path:
    """A model with tied embeddings."""
    return models["qwen2"]
