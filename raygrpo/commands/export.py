"""The exported model: a checkpoint's weights and tokenizer with a card, on disk and on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from raygrpo.commands.model_card import write_model_card
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import StorageError
from raygrpo.storage.checkpoint import find_checkpoint, open_run, verify
from raygrpo.storage.run_dir import RunDir


def export_checkpoint(
    run_dir: RunDir, path: Path, config: RunConfig, hub_id: str | None = None
) -> Path:
    """Writes ``export/``: the model of a checkpoint with its card; replaces an older export.

    ``hub_id`` is the model's name on the hub, such as ``me/out``.

    Raises:
        StorageError: the checkpoint does not verify, or the export cannot be written.
    """
    manifest = verify(path)
    temporary = run_dir.root / ".tmp-export"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(path / "model", temporary)
        step = int(manifest["step"])
        write_model_card(temporary, config, run_dir, step=step, hub_id=hub_id)
        if run_dir.export.exists():
            shutil.rmtree(run_dir.export)
        temporary.rename(run_dir.export)
    except OSError as error:
        raise StorageError(f"cannot write {run_dir.export}: {error}") from error
    return run_dir.export


def export_run(root: Path, step: int | None = None, hub_id: str | None = None) -> Path:
    """Exports the checkpoint of ``step`` of a run on disk, or by default the best or newest one.

    Raises:
        ConfigError: no run or no such checkpoint.
        StorageError: the checkpoint does not verify.
    """
    run_dir = open_run(root)
    config = load_config(run_dir.config_path)
    return export_checkpoint(run_dir, find_checkpoint(run_dir, step), config, hub_id)
