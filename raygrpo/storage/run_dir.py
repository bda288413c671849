"""The run directory: one run's whole truth on disk, held by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raygrpo.config import RunConfig
from raygrpo.config.file import dump_config
from raygrpo.errors import ConfigError, StorageError

# Keys that a resumed run may change: they alter where and how fast it runs, or how long, not what
# the steps done so far mean.
_MAY_CHANGE = (
    "run_dir",
    "tracking.",
    "ray.",
    "checkpoint.",
    "scorers.",
    "generators.count",
    "generators.engine",  # the start compares it with the engine that was used
    "generators.options",
    "generators.max_rows",
    "weights.",
    "train.steps",
    "train.tokens_per_microbatch",
    "eval.",
    "optimizer.",
)
_MAY_CHANGE_ENDS = (".timeout_s",)
_MAY_NOT_CHANGE = ("ray.gpus.",)  # another device computes other bits
_OURS = (".lock", "logs")


class RunDir:
    """Paths of a run and its facts (``run.json``), such as the wandb id and the incarnation.

    ``config.given.yaml`` is the configuration as the user wrote it: a resumed run is compared with
    it, so that a resume may have another machine's threads. ``config.resolved.yaml`` is the
    configuration that the run works with.

    Attributes:
        changed: the keys that this start changes in a run that has checkpoints, as text.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.facts_path = root / "run.json"
        self.given_path = root / "config.given.yaml"
        self.config_path = root / "config.resolved.yaml"
        self.metrics_path = root / "metrics.jsonl"
        self.events_path = root / "events.jsonl"
        self.curve_path = root / "curve.png"
        self.checkpoints = root / "checkpoints"
        self.completions = root / "completions"
        self.export = root / "export"
        self.logs = root / "logs"
        self.changed: list[str] = []
        self._lock: int | None = None

    @classmethod
    def claim(cls, config: RunConfig) -> RunDir:
        """Creates or reopens the run's directory and holds it until `release`.

        ``config`` is the configuration as the user wrote it.

        Raises:
            ConfigError: the directory belongs to another process, another run, or something else.
            StorageError: it cannot be written.
        """
        run_dir = cls.at(config)
        try:
            run_dir._check_contents(config.run_dir)
            run_dir.root.mkdir(parents=True, exist_ok=True)
            run_dir._acquire()
            try:
                run_dir._set_up(config)
            except BaseException:
                run_dir.release()
                raise
        except OSError as error:
            raise StorageError(f"cannot write run_dir {config.run_dir!r}: {error}") from error
        return run_dir

    @classmethod
    def at(cls, config: RunConfig) -> RunDir:
        """The run's directory as it may be, not held."""
        return cls(Path(config.run_dir).expanduser().absolute())

    @property
    def revisions(self) -> dict[str, str]:
        """What a run that has checkpoints recorded of its model and data."""
        return dict(self.facts.get("revisions") or {}) if self._has_begun else {}

    @property
    def engine(self) -> str | None:
        """The engine that a run with checkpoints recorded."""
        return self.facts.get("engine") if self._has_begun else None

    @property
    def _has_begun(self) -> bool:
        return self.facts_path.is_file() and any(self.checkpoints.glob("step-*"))

    def release(self) -> None:
        """Lets go of the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def facts(self) -> dict[str, Any]:
        """The run's facts as last written."""
        try:
            loaded = json.loads(self.facts_path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise StorageError(f"cannot read {self.facts_path}: {error}") from error
        if not isinstance(loaded, dict):
            raise StorageError(f"{self.facts_path} must hold an object")
        return loaded

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; None without one."""
        best = self.facts.get("best")
        return None if best is None else int(best["step"])

    def note(self, **facts: Any) -> None:
        """Adds facts."""
        write_atomically(self.facts_path, json.dumps({**self.facts, **facts}, indent=2))

    def write_config(self, config: RunConfig) -> None:
        """Writes the resolved configuration."""
        write_atomically(self.config_path, dump_config(config))

    def next_incarnation(self) -> int:
        """Counts one more start of the learner."""
        incarnation = int(self.facts.get("incarnation", 0)) + 1
        self.note(incarnation=incarnation)
        return incarnation

    def _check_contents(self, name: str) -> None:
        found = [path.name for path in self.root.iterdir()] if self.root.exists() else []
        foreign = [
            n for n in found if n not in _OURS and not n.startswith(f".{self.facts_path.name}")
        ]
        if foreign and not self.facts_path.is_file():
            raise ConfigError(
                f"run_dir {name!r} holds something that is no run ({foreign[0]})",
                "name an empty or new directory",
            )

    def _set_up(self, config: RunConfig) -> None:
        if not self.facts_path.is_file():
            write_atomically(self.facts_path, json.dumps({"incarnation": 0}))
        self.changed = self._check_config(config)
        self.logs.mkdir(exist_ok=True)
        write_atomically(self.given_path, dump_config(config))

    def _acquire(self) -> None:
        self._lock = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(
                f"run_dir {self.root} is in use by another process",
                "wait for it to end, or set another run_dir",
            ) from None

    def _check_config(self, config: RunConfig) -> list[str]:
        """Which keys a resumed run changes, as text; refuses what would make it another run."""
        if not (self.given_path.is_file() and self._has_begun):
            return []
        try:
            stored = yaml.safe_load(self.given_path.read_text()) or {}
        except yaml.YAMLError as error:
            raise StorageError(f"{self.given_path} is damaged: {error}") from None
        before, after = _flatten(stored), _flatten(config.model_dump(mode="json"))
        names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        changed = {n: f"{n}: {before.get(n)!r} -> {after.get(n)!r}" for n in names}
        refused = [
            text
            for name, text in changed.items()
            if name.startswith(_MAY_NOT_CHANGE)
            or not (name.startswith(_MAY_CHANGE) or name.endswith(_MAY_CHANGE_ENDS))
        ]
        if refused:
            raise ConfigError(
                f"run_dir {config.run_dir!r} holds a run with another configuration "
                f"({'; '.join(refused)})",
                "restore these keys to resume it, or set another run_dir",
            )
        return list(changed.values())


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a complete new one, or leaves the old one as it was.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
