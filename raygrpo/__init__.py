"""raygrpo: GRPO for causal language models on a Ray cluster of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "train"]

if TYPE_CHECKING:
    from raygrpo.commands.train import train


def __getattr__(name: str) -> Any:
    # Late, so that actors and reward children import the package without the driver's libraries.
    if name == "train":
        from raygrpo.commands.train import train

        return train
    raise AttributeError(f"module 'raygrpo' has no attribute {name!r}")
