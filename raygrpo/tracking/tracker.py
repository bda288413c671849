"""One face for all that records a run: files, console, wandb, TensorBoard, alarms, the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from raygrpo.actors.profiling import ProfileRequest
from raygrpo.config import RunConfig
from raygrpo.errors import StorageError
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.alarms import Alarms
from raygrpo.tracking.console import Console
from raygrpo.tracking.curve import draw_curve
from raygrpo.tracking.files import EventsFile, MetricsFile
from raygrpo.tracking.tensorboard import TensorBoardWriter
from raygrpo.tracking.wandb_logger import WandbLogger


class Tracker:
    """Records a run in a claimed run directory.

    The run goes on from the checkpoint of ``resume_step`` (None: from the start). Metrics of later
    steps are cut off, since the run does these steps again. An event ``profile`` announces the
    traces of ``profile`` once they are on disk.

    Attributes:
        last_metrics: the newest value of every metric logged by this process.

    Raises:
        StorageError: a file of the run directory cannot be read or written.
    """

    def __init__(
        self,
        root: Path,
        config: RunConfig,
        *,
        resume_step: int | None = None,
        profile: ProfileRequest | None = None,
        file: IO[str] | None = None,
    ) -> None:
        self._run_dir = RunDir(root)
        self._steps = config.train.steps
        self._last_step = max(resume_step or 0, 0)
        self._closed = False
        self._profile = profile
        self.last_metrics: dict[str, float] = {}
        self._metrics = MetricsFile(self._run_dir.metrics_path, resume_step=resume_step)
        self._events = EventsFile(self._run_dir.events_path)
        self._console = Console(self._steps, first_step=self._last_step, file=file)
        self._tensorboard: TensorBoardWriter | None = None
        if config.tracking.tensorboard:
            self._tensorboard = TensorBoardWriter(
                root / "tensorboard", resume_step=resume_step, on_event=self._record_event
            )
        self._wandb = WandbLogger(self._run_dir, config)
        self._alarms = Alarms(config)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a step; it is on disk on return."""
        self._metrics.log(step, metrics)
        self._last_step = step
        self.last_metrics |= metrics
        self._console.log_step(step, metrics)
        if self._tensorboard is not None:
            self._tensorboard.log_step(step, metrics)
        self._wandb.log_step(step, metrics)
        self._take_events()
        for alarm in self._alarms.check(metrics):
            self._record_event("alarm", {"step": step, **asdict(alarm)})
        self._announce_profile()

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to wandb's table ``completions``; its columns are those of the first call.

        A row holds step, prompt, completion, reward, advantage and each reward by its name. A step
        that a resumed run does again has its rows twice.
        """
        self._wandb.log_completions(step, rows)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Records an event; it is on disk on return."""
        self._take_events()
        self._record_event(kind, fields)

    def close(self, exit_code: int | None = None) -> None:
        """Draws the curve and ends the logs; more than once is fine.

        ``exit_code`` None is 0 when the last step was logged, else 1.
        """
        if self._closed:
            return
        self._closed = True
        if exit_code is None:
            exit_code = int(self._last_step < self._steps)
        self._announce_profile(last=True)
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._wandb.close(exit_code)
        self._take_events()
        try:
            draw_curve(self._run_dir.metrics_path, self._run_dir.curve_path)
        except StorageError as error:  # a finished run does not fail for its picture
            self._record_event("curve_failed", {"error": str(error)})
        self._console.close()
        self._metrics.close()
        self._events.close()

    def _announce_profile(self, *, last: bool = False) -> None:
        """Records where the traces are once both are there; at the end, which of them are."""
        profile = self._profile
        if profile is None or self._last_step < profile.step:
            return
        paths = {name: profile.path(f"{name}-0") for name in ("learner", "generator")}
        found = {name: str(path) for name, path in paths.items() if path.is_file()}
        if last or len(found) == len(paths):
            self._profile = None
            missing = ", ".join(paths.keys() - found.keys())
            self._record_event("profile", {**found, **({"missing": missing} if missing else {})})

    def _take_events(self) -> None:
        """Records what wandb's thread reported: this thread alone writes the files."""
        for kind, fields in self._wandb.take_events():
            self._record_event(kind, fields)

    def _record_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._events.log(kind, fields)
        self._console.event(kind, fields)
