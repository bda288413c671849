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
from raygrpo.config_file import dump_config
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
    "generators.threads",
    "generators.max_rows",
    "learner.threads",
    "train.steps",
    "train.tokens_per_microbatch",
    "eval.",
)


class RunDir:
    """Paths of a run and its facts (``run.json``): wandb id, incarnation, versions of packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.facts_path = root / "run.json"
        self.config_path = root / "config.resolved.yaml"
        self.metrics_path = root / "metrics.jsonl"
        self.events_path = root / "events.jsonl"
        self.curve_path = root / "curve.png"
        self.checkpoints = root / "checkpoints"
        self.export = root / "export"
        self.logs = root / "logs"
        self._lock: int | None = None

    @classmethod
    def claim(cls, config: RunConfig) -> RunDir:
        """Creates or reopens the run's directory and holds it until `release`.

        Raises:
            ConfigError: the directory belongs to another process, another run, or something else.
            StorageError: it cannot be written.
        """
        run_dir = cls(Path(config.run_dir).expanduser().absolute())
        try:
            is_new = not run_dir.root.exists() or not any(run_dir.root.iterdir())
            if not is_new and not run_dir.facts_path.is_file():
                raise ConfigError(
                    f"run_dir {config.run_dir!r} holds something that is no run",
                    "name an empty or new directory",
                )
            run_dir.root.mkdir(parents=True, exist_ok=True)
            run_dir._acquire()
            run_dir._check_config(config)
            run_dir.logs.mkdir(exist_ok=True)
            write_atomically(run_dir.config_path, dump_config(config))
            if not run_dir.facts_path.is_file():
                write_atomically(run_dir.facts_path, json.dumps({"incarnation": 0}))
        except OSError as error:
            raise StorageError(f"cannot write run_dir {config.run_dir!r}: {error}") from error
        return run_dir

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

    def note(self, **facts: Any) -> None:
        """Adds facts."""
        write_atomically(self.facts_path, json.dumps({**self.facts, **facts}, indent=2))

    def next_incarnation(self) -> int:
        """Counts one more start of the learner."""
        incarnation = int(self.facts.get("incarnation", 0)) + 1
        self.note(incarnation=incarnation)
        return incarnation

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

    def _check_config(self, config: RunConfig) -> None:
        if not self.config_path.is_file():
            return
        before = _flatten(yaml.safe_load(self.config_path.read_text()) or {})
        after = _flatten(config.model_dump(mode="json"))
        changed = sorted(
            name
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name) and not name.startswith(_MAY_CHANGE)
        )
        if changed:
            detail = "; ".join(f"{n}: {before.get(n)!r} -> {after.get(n)!r}" for n in changed)
            self.release()
            raise ConfigError(
                f"run_dir {config.run_dir!r} holds a run with another configuration ({detail})",
                "restore these keys to resume it, or set another run_dir",
            )


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a complete new one, or leaves the old one as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
