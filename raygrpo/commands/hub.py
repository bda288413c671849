"""A run's model on the Hugging Face hub: weights, tokenizer and card, in one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from raygrpo.commands.export import export_run
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, InfraError, RayGrpoError
from raygrpo.storage.checkpoint import find_checkpoint, open_run
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.files import read_metrics

# The files of a model. Pickles (.bin, .pt, .pkl) are left out: loading one runs code.
PUSHED = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".py")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
# The HTTP client's own error, whose library differs between versions of huggingface_hub.
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]
_RETRY_LATER = (408, 425, 429)


def push_run(
    root: Path,
    hub_id: str,
    *,
    step: int | None = None,
    public: bool = False,
    branch: str | None = None,
) -> str:
    """Exports a checkpoint of a run and uploads it to ``hub_id``; returns its address.

    Raises:
        ConfigError: there is no such run or checkpoint, or no right to write to ``hub_id``.
        InfraError: the hub cannot be reached or fails.
        StorageError: the checkpoint does not verify.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ConfigError(f"{hub_id!r} is no name on the hub", "write --push-to-hub ORG/NAME")
    if get_token() is None:
        raise ConfigError(
            "there is no token for the hub",
            "run `hf auth login`, or set HF_TOKEN to one that writes",
        )
    run_dir = open_run(root)
    step = int(find_checkpoint(run_dir, step).name.removeprefix("step-"))
    export = export_run(root, step, hub_id)
    return push(export, hub_id, commit_message(run_dir, step), public=public, branch=branch)


def push(
    export: Path, hub_id: str, message: str, *, public: bool = False, branch: str | None = None
) -> str:
    """Uploads an export in one commit: the hub shows all of the export, or nothing of it.

    A new repository is private unless ``public``. Weights of an earlier upload that this one does
    not replace are deleted by the same commit.

    Raises:
        ConfigError: the hub refuses.
        InfraError: the hub cannot be reached or fails; the same call may be made again.
    """
    api = HfApi()
    try:
        api.create_repo(hub_id, private=not public, exist_ok=True)
        if not (api.model_info(hub_id).private or public):
            raise ConfigError(
                f"{hub_id} exists and is public",
                "if it is yours, pass --public or make it private on the hub; otherwise "
                "choose another name",
            )
        if branch is not None:
            api.create_branch(hub_id, branch=branch, exist_ok=True)
        there = api.list_repo_files(hub_id, revision=branch)
        # Not `upload_folder`: with Xet, it may cut an upload into several commits.
        api.create_commit(
            hub_id, _operations(export, there), commit_message=message, revision=branch
        )
    except (_HTTP_ERROR, OSError, ValueError, RuntimeError) as error:
        raise _explained(error, hub_id) from error
    address = f"{api.endpoint}/{hub_id}"
    return f"{address}/tree/{branch}" if branch else address


def _operations(
    export: Path, there: Sequence[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    files = [
        path
        for path in sorted(export.iterdir())
        if path.is_file() and not path.is_symlink() and path.name.endswith(PUSHED)
    ]
    names = {path.name for path in files}
    top = [name for name in there if "/" not in name]  # an export has no folders
    stale = [name for name in top if name.endswith(_WEIGHTS) and name not in names]
    adds = [CommitOperationAdd(path.name, str(path)) for path in files]
    return [*adds, *(CommitOperationDelete(name) for name in stale)]


def commit_message(run_dir: RunDir, step: int) -> str:
    """The exported step and what was measured of it: the best metric, else the reward.

    Raises:
        StorageError: config.resolved.yaml or metrics.jsonl cannot be read.
    """
    rows = reversed(read_metrics(run_dir.metrics_path))
    row: Mapping[str, Any] = next((row for row in rows if row["step"] == step), {})
    best = (load_config(run_dir.config_path).eval.best.metric or "").removeprefix("-")
    for name in (best, "eval/reward", "eval/greedy/reward", "reward"):
        if isinstance(row.get(name), int | float):
            return f"Step {step}: {name} {row[name]:.4g}"
    return f"Step {step}"


def _explained(error: Any, hub_id: str) -> RayGrpoError:
    """The error for the user that the hub's answer means."""
    causes = list(_causes(error))
    status = next((code for e in causes if (code := _status(e)) is not None), None)
    reason = str(causes[-1]).strip().partition("\n")[0] or type(causes[-1]).__name__
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return ConfigError("HF_HUB_OFFLINE is set: nothing can be pushed", "unset it")
    if status == 401:
        return ConfigError(
            "the hub does not accept the token",
            "run `hf auth login`, or set HF_TOKEN to a valid one",
        )
    if status == 403:
        return ConfigError(
            f"this token may not write to {hub_id}: it belongs to somebody else, or the token is "
            "read-only",
            "push to a name of your own, or use a token with the right to write there",
        )
    if status == 404:
        return ConfigError(f"the hub knows no {hub_id}", "check the organisation and the branch")
    refused = status is not None and status < 500 and status not in _RETRY_LATER
    # An answer that is no JSON is a proxy's page, or another server's than the hub's.
    garbled = isinstance(error, json.JSONDecodeError)
    if refused or (status is None and isinstance(error, ValueError) and not garbled):
        message = getattr(error, "server_message", None) or reason
        return ConfigError(f"the hub refuses {hub_id}: {message}")
    what = f"failed with status {status}" if status else f"cannot be reached: {reason}"
    return InfraError(f"the hub {what}; {hub_id} shows nothing of this upload", "push again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None
