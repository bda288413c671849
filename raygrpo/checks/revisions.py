"""The revisions of models and data sets: found at the first start, recorded, then kept."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from raygrpo.config import DataSection, EvalDataSection, ModelSection, RunConfig
from raygrpo.config.sections import DataKeys
from raygrpo.data.sources import eval_section, is_on_hub
from raygrpo.errors import ConfigError

K = TypeVar("K", bound=DataKeys)
M = TypeVar("M", DataSection, EvalDataSection)
_SHA = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10.0
_SAMPLE_BYTES = 1 << 20
# The HTTP client's own error, whose library differs between versions of huggingface_hub.
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A configuration whose hub models and data sets name their commits.

    ``revisions`` maps a role (model, data, data.mixture.0, eval) to ``name@commit``, or to
    ``name:fingerprint`` for a local model; unknown revisions are missing. ``changed`` lists the
    differences to the record, such as ``"model: a/b@12.. -> a/b@34.."``.
    """

    config: RunConfig
    revisions: Mapping[str, str]
    changed: tuple[str, ...] = ()


def pin(
    config: RunConfig, recorded: Mapping[str, str] | None = None, passed: Collection[str] = ()
) -> Pinned:
    """Fills in the revisions that the run recorded, or else the hub's newest.

    If the hub does not answer, the revision in the local cache is taken. ``passed`` names the
    roles (data, eval) whose data set was passed in Python.

    Raises:
        ConfigError: the hub has no such revision, or (offline) the cache holds another revision
            than the run recorded.
    """
    pins = _Pins(recorded or {})
    model = config.model
    if Path(model.path).expanduser().exists():
        pins.found["model"] = fingerprint(model)
    elif sha := pins.commit("model", "model", model.path, model.revision):
        model = model.model_copy(update={"revision": sha})
    section, evaluation = config.data, config.eval
    if "data" not in passed:
        section = _pinned_mixture(pins, "data", section, section.source)
    if evaluation.eval_steps and "eval" not in passed:
        own = _pinned_mixture(pins, "eval", evaluation.data, section.source)
        evaluation = evaluation.model_copy(update={"data": own})
        used = eval_section(section, evaluation, seed=config.seed)
        if is_on_hub(used.source) and (sha := used.params.get("revision")):
            pins.found["eval"] = f"{used.source}@{sha}"
    both = sorted(pins.recorded.keys() & pins.found.keys())
    return Pinned(
        config=config.model_copy(update={"model": model, "data": section, "eval": evaluation}),
        revisions={**pins.found, **pins.recorded},
        changed=tuple(
            f"{role}: {pins.recorded[role]} -> {pins.found[role]}"
            for role in both
            if pins.recorded[role] != pins.found[role]
        ),
    )


def fingerprint(model: ModelSection) -> str:
    """``name:hash`` of a local model: its config, and each weight file's size, header and start."""
    path = Path(model.path).expanduser()
    digest = xxhash.xxh3_64()
    for file in [path / "config.json", *sorted(path.glob("*.safetensors"))]:
        if not file.is_file() or (model.random_init and file.suffix == ".safetensors"):
            continue
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            header = int.from_bytes(opened.read(8), "little") if file.suffix != ".json" else 0
            opened.seek(0)
            digest.update(opened.read(min(header, 64 * _SAMPLE_BYTES) + _SAMPLE_BYTES))
    return f"{path.absolute().name}:{digest.hexdigest()}"


class _Pins:
    def __init__(self, recorded: Mapping[str, str]) -> None:
        self.recorded = recorded
        self.found: dict[str, str] = {}

    def commit(self, role: str, kind: str, name: str, asked: str | None) -> str | None:
        """The commit of ``name`` that this run uses; None if it is unknown."""
        sha: str | None
        before = self.recorded.get(role, "").rpartition("@")
        if before[0] == name:
            sha = before[2]
        elif asked is not None and _SHA.fullmatch(asked):
            sha = asked
        else:
            sha = _hub_commit(kind, name, asked) or _cached_commit(kind, name, asked)
        if sha is None:
            return None
        if kind == "dataset" and constants.HF_HUB_OFFLINE:
            _refuse_other_copy(name, sha)
        self.found[role] = f"{name}@{sha}"
        return sha


def _pinned_mixture(pins: _Pins, role: str, keys: M, inherited: str) -> M:
    """``keys`` with a revision in ``params`` of each part that names a source or a revision."""
    pinned = _pinned(pins, role, keys, inherited)
    mixture = [
        _pinned(pins, f"{role}.mixture.{index}", part, keys.source or inherited)
        for index, part in enumerate(keys.mixture)
    ]
    return pinned.model_copy(update={"mixture": mixture}) if mixture else pinned


def _pinned(pins: _Pins, role: str, keys: K, inherited: str) -> K:
    source, params = keys.source or inherited, keys.params
    named = is_on_hub(source) and (keys.source or "revision" in params)
    if named and (sha := pins.commit(role, "dataset", source, params.get("revision"))):
        return keys.model_copy(update={"params": {**params, "revision": sha}})
    return keys


def _hub_commit(kind: str, name: str, asked: str | None) -> str | None:
    """The hub's commit; None if the hub does not answer, or has no such repository."""
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=asked, timeout=_TIMEOUT_S)
    except RevisionNotFoundError:
        raise ConfigError(
            f"{name} has no revision {asked!r}", "name a branch, tag or commit that it has"
        ) from None
    except (RepositoryNotFoundError, _HTTP_ERROR, OSError, ValueError):
        return None  # the library that loads it explains the error, or uses the cache
    return info.sha


def _cached_commit(kind: str, name: str, asked: str | None) -> str | None:
    if kind == "dataset" and (copy := _newest(_dataset_copies(name))):
        return copy
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    reference = folder / "refs" / (asked or "main")
    if reference.is_file():
        sha = reference.read_text().strip()
        return sha if (folder / "snapshots" / sha).is_dir() and _SHA.fullmatch(sha) else None
    # Files that were fetched by their commit leave no reference behind.
    return _newest(folder.glob("snapshots/*")) if asked is None else None


def _dataset_copies(name: str) -> Iterable[Path]:
    """The folders of a data set's commits that the library `datasets` has prepared.

    Without a hub the library takes the newest folder, whatever revision is asked for.
    """
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, own = name.rpartition("/")
    folder = "___".join(filter(None, [owner, camelcase_to_snakecase(own)]))
    return Path(config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*")


def _newest(copies: Iterable[Path]) -> str | None:
    """The commit of the newest folder; a folder has its commit as its name."""
    named = [path for path in copies if path.is_dir() and _SHA.fullmatch(path.name)]
    return max(named, key=lambda path: path.stat().st_mtime).name if named else None


def _refuse_other_copy(name: str, sha: str) -> None:
    newest = _newest(_dataset_copies(name))
    if newest not in (None, sha):
        raise ConfigError(
            f"the run uses {name} at {sha}, and the newest copy here is of {newest}",
            "unset HF_HUB_OFFLINE, so that the right copy can be fetched",
        )
