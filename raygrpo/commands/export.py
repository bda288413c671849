"""The exported model: a checkpoint's weights and tokenizer with a card, on disk and on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.checkpoint import Checkpoints, verify
from raygrpo.storage.run_dir import RunDir


def export_checkpoint(
    run_dir: RunDir,
    path: Path,
    config: RunConfig,
    tokenizer: Any,
    example: Any = None,
    hub_id: str | None = None,
) -> Path:
    """Makes ``export/``: the model of a checkpoint with its card; an older export is replaced.

    ``example`` is a prompt (text or messages) for the card's quick start; ``hub_id`` is where the
    model is going to be published.

    Raises:
        StorageError: the checkpoint does not verify, or the export cannot be written.
    """
    from raygrpo.commands.model_card import card_facts, write_model_card

    manifest = verify(path)
    temporary = run_dir.root / ".tmp-export"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(path / "model", temporary)
        step = int(manifest["step"])
        facts = card_facts(
            config,
            run_dir.root,
            step=step,
            tokenizer=tokenizer,
            example=example,
            hub_id=hub_id,
        )
        write_model_card(temporary, facts)
        if run_dir.export.exists():
            shutil.rmtree(run_dir.export)
        temporary.rename(run_dir.export)
    except OSError as error:
        raise StorageError(f"cannot write {run_dir.export}: {error}") from error
    return run_dir.export


def export_run(root: Path, step: int | None = None, hub_id: str | None = None) -> Path:
    """Exports a checkpoint of a run on disk: the one of ``step``, else the best or the newest.

    Raises:
        ConfigError: no run or no such checkpoint.
        StorageError: the checkpoint does not verify.
    """
    from raygrpo.models import load_tokenizer

    run_dir = open_run(root)
    config = load_config(run_dir.config_path)
    path = find_checkpoint(run_dir, step)
    tokenizer = load_tokenizer(
        config.model.model_copy(update={"path": str(path / "model"), "revision": None})
    )
    example = run_dir.facts.get("example")
    return export_checkpoint(run_dir, path, config, tokenizer, example, hub_id)


def open_run(root: Path) -> RunDir:
    """The run on disk at ``root``, not claimed.

    Raises:
        ConfigError: there is none.
    """
    run_dir = RunDir(root.expanduser().absolute())
    if not run_dir.config_path.is_file():
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
