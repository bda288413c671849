"""TensorBoard: the metrics as scalars under RUN/tensorboard."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError

EventSink = Callable[[str, dict[str, Any]], None]


def check_tensorboard(config: RunConfig) -> None:
    """Checks before a run that TensorBoard's package is there if the run needs it.

    Raises:
        ConfigError: ``tracking.tensorboard`` is on, and the package is missing.
    """
    if not config.tracking.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tracking.tensorboard needs the package tensorboard ({error})",
            "install the extra tensorboard, or set tracking.tensorboard: false",
        ) from None


class TensorBoardWriter:
    """Writes each step's metrics; a failure is one event (``tensorboard_failed``), never the run's.

    ``resume_step``: TensorBoard hides the steps after it that an earlier start wrote.
    """

    def __init__(self, directory: Path, *, resume_step: int | None, on_event: EventSink) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._on_event = on_event
        self._writer: Any = None
        first = 0 if resume_step is None else resume_step + 1
        self._writer = self._guard(lambda: SummaryWriter(directory, purge_step=first))

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one step; it is on disk on return."""
        if self._writer is not None:
            self._guard(lambda: self._write(step, metrics))

    def close(self) -> None:
        """Ends the file; more than once is fine."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._guard(writer.close)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:  # the writer's own thread hands errors of the disk on
            self._writer = None
            self._on_event("tensorboard_failed", {"error": f"{type(error).__name__}: {error}"})
            return None
