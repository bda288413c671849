"""Checkpoints: a directory is one iff its manifest, written last, verifies.

Everything is written into a temporary directory and synced; the manifest (sizes and checksums of
all files) comes last; then one rename makes it a checkpoint. A crash at any point leaves the older
checkpoints and at most a temporary directory, which the next save removes.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import xxhash

from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.run_dir import RunDir

MANIFEST = "manifest.json"
STATE = "state.pkl"
_FORMAT = 1
_CHUNK = 2**24


class Checkpoints:
    """The ``checkpoints/`` folder of a run; `prune` leaves the ``keep`` newest (0: all)."""

    def __init__(self, root: Path, keep: int = 0) -> None:
        self._root = root
        self._keep = keep

    def begin(self, step: int) -> Path:
        """A fresh temporary directory to save into; leftovers of earlier crashes go."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            for leftover in self._root.glob(".tmp-*"):
                shutil.rmtree(leftover)
            path = self._root / f".tmp-{_name(step)}"
            path.mkdir()
        except OSError as error:
            raise StorageError(f"cannot start a checkpoint in {self._root}: {error}") from error
        return path

    def commit(self, directory: Path, step: int, state: Any) -> Path:
        """Makes a saved directory the checkpoint of ``step``; returns its final path.

        ``state`` is what the driver remembers, in one pickle.

        Raises:
            StorageError: it cannot be written; older checkpoints are untouched.
        """
        final = self.path(step)
        try:
            with (directory / STATE).open("wb") as file:
                pickle.dump(state, file)
            files = {}
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                _sync(path)
                files[str(path.relative_to(directory))] = _fingerprint(path)
            manifest = {"format": _FORMAT, "step": step, "files": files}
            (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for folder in (directory / MANIFEST, *(p for p in directory.rglob("*") if p.is_dir())):
                _sync(folder)
            _sync(directory)
            older = self._root / f".tmp-old-{final.name}"
            if final.exists():  # renamed, not removed: that takes long enough to be killed in
                final.rename(older)
            directory.rename(final)
            _sync(self._root)
            shutil.rmtree(older, ignore_errors=True)
        except OSError as error:
            raise StorageError(f"cannot commit the checkpoint {final}: {error}") from error
        return final

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self._root / _name(step)

    def all(self) -> list[Path]:
        """Committed checkpoints, oldest first, verified or not."""
        return sorted(self._root.glob("step-*")) if self._root.is_dir() else []

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and why newer ones do not."""
        problems = []
        for path in reversed(self.all()):
            try:
                verify(path)
            except StorageError as error:
                problems.append(str(error))
                continue
            return path, problems
        return None, problems

    def prune(self, newest: Path, best_step: int) -> None:
        """Keeps the newest and the best; later steps than ``newest``, which a damaged checkpoint
        may have left, do not count.

        Raises:
            StorageError: an old one cannot be removed.
        """
        old = [path for path in self.all() if path <= newest][: -self._keep] if self._keep else []
        for path in old:
            if path != self.path(best_step):
                # Renamed first: a crash in the middle must not leave half a checkpoint.
                doomed = self._root / f".tmp-old-{path.name}"
                try:
                    path.rename(doomed)
                    shutil.rmtree(doomed)
                except OSError as error:
                    raise StorageError(f"cannot remove {path}: {error}") from error


def verify(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, which is returned.

    Raises:
        StorageError: the manifest is missing or damaged, or a file differs from it.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        expected = manifest["files"]
        if manifest["format"] != _FORMAT:
            raise StorageError(f"{path}: unknown checkpoint format {manifest['format']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} has no readable manifest: {error}") from None
    for name, fingerprint in expected.items():
        file = path / name
        try:
            same = file.stat().st_size == fingerprint["bytes"] and _fingerprint(file) == fingerprint
        except OSError as error:
            raise StorageError(f"{path}: {name} cannot be read: {error}") from None
        if not same:
            raise StorageError(f"{path}: {name} is damaged")
    return manifest


def _name(step: int) -> str:
    return f"step-{step:08}"


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_64": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_run(root: Path) -> RunDir:
    """The run on disk at ``root``, not claimed.

    Raises:
        ConfigError: there is none.
    """
    run_dir = RunDir(root.expanduser().absolute())
    if not run_dir.given_path.is_file():
        raise ConfigError(f"{root} holds no run", "name a run directory")
    return run_dir


def find_checkpoint(run_dir: RunDir, step: int | str | None) -> Path:
    """The checkpoint of a step, the ``best`` or the ``last`` one (the newest that verifies).

    None: the best if there is one, else the last.

    Raises:
        ConfigError: there is none.
    """
    checkpoints = Checkpoints(run_dir.checkpoints)
    if step in (None, "best"):
        if run_dir.best_step is None and step == "best":
            raise ConfigError(f"{run_dir.root} has no best checkpoint", "set eval.best.metric")
        step = "last" if run_dir.best_step is None else run_dir.best_step
    if not isinstance(step, int):
        path, problems = checkpoints.newest_valid()
        reason = "; ".join(problems) or "it was stopped before its first one"
    else:
        path = checkpoints.path(step) if checkpoints.path(step).is_dir() else None
        reason = f"it has {', '.join(p.name for p in checkpoints.all()) or 'none'}"
    if path is None:
        raise ConfigError(f"{run_dir.root} has no such checkpoint: {reason}")
    return path
