"""Retraining from stored rollouts: the learner alone, on what a run generated and scored.

In deterministic mode, with as many ranks and threads, the weights of a replay are bit for bit those
of the run's own updates. docs/rollouts.md says what else it is good for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raygrpo.actors.cluster.connect import placing
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.learner import LearnerGroup
from raygrpo.actors.rollout_writer import put_groups
from raygrpo.checks.checked import anchored
from raygrpo.commands.scope import Scope, open_scope
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.checkpoint import Checkpoints, open_run
from raygrpo.storage.rollouts import FileFacts, file_path, files, read_facts, read_step
from raygrpo.storage.run_dir import RunDir, write_atomically
from raygrpo.tracking.files import MetricsFile, read_metrics
from raygrpo.tracking.metrics import stat_metrics

_FACTS = "replay.json"
_WHY = (
    "a replay needs every group: set tracking.completions.frac to 1 and max_gb high enough; "
    "--steps N replays the first N steps"
)
# A change of these keys in the middle of a run changes its later steps.
_STEP_KEYS = ("optimizer.", "train.", "ray.threads.learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A finished replay: its directory, with ``metrics.jsonl`` and ``model/``, and its steps.

    ``changes``: keys that the run changed on the way; the replay used the last values.
    """

    directory: Path
    steps: int
    changes: list[str]


def replay(
    root: Path,
    out: Path | None = None,
    *,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
) -> Replay:
    """Trains the run's initial model on its stored rollouts, step by step.

    Each step is planned as it was (minibatches, advantages, loss weights) and placed anew on the
    ranks. Nothing is generated, scored or published.

    Args:
        root: a run directory.
        out: where to write; none takes ``replay`` in the run directory.
        steps: how many steps; none takes all that the run has trained.
        overrides: ``section.key=value`` strings over the run's configuration.
        on_step: called with each step and its metrics.

    Raises:
        ConfigError: no run, no model, or a store in which something is missing.
        StorageError: a file cannot be read or written.
    """
    run_dir = open_run(root)
    config = anchored(load_config(run_dir.config_path, overrides))
    paths = stored_steps(run_dir, steps)
    directory = _claim(
        out or run_dir.root / "replay",
        {"run": str(run_dir.root), "steps": len(paths), "overrides": list(overrides)},
    )
    metrics: dict[str, float] = {}
    with open_scope() as scope:
        learner = _start_learner(config, directory / "logs", scope)
        log = MetricsFile(directory / "metrics.jsonl", resume_step=None)
        scope.closers.callback(log.close)
        for step, path in enumerate(paths, start=1):
            batch = read_step(path)
            pending = learner.update(replace(batch, payloads=put_groups(batch.payloads)), 1)
            result = pending.wait()
            metrics = stat_metrics(result.stats) | {"timing/update_s": result.seconds}
            log.log(step, metrics)
            on_step(step, metrics)
        learner.save(directory).wait()
    return Replay(directory=directory, steps=len(paths), changes=_changes(run_dir))


def _start_learner(config: RunConfig, logs: Path, scope: Scope) -> LearnerGroup:
    # The ranks' threads are the run's own: they decide the last bits.
    cluster = scope.join(config, roles=["learner"])
    local = cluster.connection.local
    site = Site(local=local, logs=logs if local else None)
    learner = LearnerGroup(cluster.config, None, site)
    scope.closers.callback(learner.close)
    with placing(cluster.connection):
        learner.start().wait()
    return learner


def stored_steps(run_dir: RunDir, steps: int | None) -> list[Path]:
    """The files of the first ``steps`` steps (all that the run has trained, with None), in order.

    Raises:
        ConfigError: one of them is missing, or does not hold every group of its step.
    """
    found = files(run_dir.completions, "step")
    try:
        facts = {step: read_facts(path) for step, path in found.items()}
    except StorageError as error:
        raise ConfigError(f"the rollout store cannot be replayed: {error}") from None
    last = steps or _last_step(run_dir, facts)
    if not last:
        raise ConfigError(f"{run_dir.root} has trained no step that could be replayed")
    for step in range(1, last + 1):
        name = file_path(run_dir.completions, "step", step).name
        if step not in facts or not facts[step].num_minibatches:
            raise ConfigError(f"the rollout store is partial: {name} is missing", _WHY)
        if not facts[step].complete:
            raise ConfigError(f"the rollout store is partial: {name} lacks groups", _WHY)
    return [found[step] for step in range(1, last + 1)]


def _last_step(run_dir: RunDir, facts: Mapping[int, FileFacts]) -> int:
    """The last step that the run has trained: its files of any kind may know of a later one."""
    reached = [step for step, fact in facts.items() if fact.num_minibatches]
    reached += [int(path.name[-8:]) for path in Checkpoints(run_dir.checkpoints).all()]
    reached += [row["step"] for row in read_metrics(run_dir.metrics_path)]
    return max(reached, default=0)


def _claim(directory: Path, facts: dict[str, Any]) -> Path:
    """An empty directory for a replay; an older replay there is removed."""
    directory = directory.expanduser().absolute()
    try:
        if directory.is_dir() and any(directory.iterdir()):
            if not (directory / _FACTS).is_file():
                raise ConfigError(
                    f"{directory} holds other files than a replay's", "name an empty directory"
                )
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {directory}: {error}") from error
    write_atomically(directory / _FACTS, json.dumps(facts, indent=2))
    return directory


def _changes(run_dir: RunDir) -> list[str]:
    path = run_dir.events_path
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    changes = [line for line in lines if '"config_changed"' in line and line.endswith("\n")]
    events = [json.loads(line) for line in changes]
    return [e["change"] for e in events if e["change"].startswith(_STEP_KEYS)]
