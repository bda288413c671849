"""Retraining from stored rollouts: the learner alone, on what a run generated and scored.

In deterministic mode, with as many ranks and threads, the weights of a replay are bit for bit those
of the run's own updates. docs/rollouts.md says what else it is good for.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raygrpo.actors.cluster.connect import connect, disconnect, placing
from raygrpo.actors.cluster.placement import demand_of, freed
from raygrpo.actors.learner import LearnerGroup
from raygrpo.actors.rollout_writer import put_groups
from raygrpo.commands.export import open_run
from raygrpo.commands.signals import StopSignals
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, StorageError
from raygrpo.models import anchored_model, check_model_path
from raygrpo.storage.checkpoint import Checkpoints
from raygrpo.storage.rollouts import FileFacts, file_path, files, read_facts, read_file
from raygrpo.storage.run_dir import RunDir, write_atomically
from raygrpo.tracking.files import MetricsFile, read_metrics
from raygrpo.tracking.metrics import stat_metrics
from raygrpo.types import (
    Completion,
    Group,
    GroupRequest,
    PlannedSample,
    Prompt,
    Sampling,
    StepBatch,
    Version,
)

_FACTS = "replay.json"
_WHY = (
    "replay needs every group: frac 1 in tracking.completions, and room below its max_gb; "
    "--steps replays what comes before"
)
# A change of these in the middle of a run changes what its later steps did.
_STEP_KEYS = ("optimizer.", "train.", "ray.threads.learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A finished replay: its directory, with ``metrics.jsonl`` and ``model/``, and its steps.

    ``changes``: keys whose value the run changed on the way; the replay used the last one.
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
    config = load_config(run_dir.config_path, overrides)
    check_model_path(config.model)
    config = config.model_copy(update={"model": anchored_model(config.model)})
    paths = stored_steps(run_dir, steps)
    directory = _claim(
        out or run_dir.root / "replay",
        {"run": str(run_dir.root), "steps": len(paths), "overrides": list(overrides)},
    )
    metrics: dict[str, float] = {}
    with contextlib.ExitStack() as closers:
        learner = _start_learner(config, directory / "logs", closers)
        log = closers.enter_context(MetricsFile(directory / "metrics.jsonl", resume_step=None))
        for step, path in enumerate(paths, start=1):
            batch = read_step(path)
            pending = learner.update(replace(batch, payloads=put_groups(batch.payloads)), 1)
            result = pending.wait()
            metrics = stat_metrics(result.stats) | {"timing/update_s": result.seconds}
            log.log(step, metrics)
            on_step(step, metrics)
        learner.save(directory).wait()
    return Replay(directory=directory, steps=len(paths), changes=_changes(run_dir))


def _start_learner(config: RunConfig, logs: Path, closers: contextlib.ExitStack) -> LearnerGroup:
    signals = StopSignals()
    closers.callback(signals.uninstall)
    signals.install()
    # What a cluster must have room for is the learner alone; the ranks' threads stay the run's.
    alone = freed(config, "generator", "scorer")
    with signals.kept():
        connection = connect(alone, demand_of(alone))
        closers.callback(disconnect, connection)
    local = connection.local
    learner = LearnerGroup(connection.config, None, local=local, logs=logs if local else None)
    closers.callback(learner.close)
    with placing(connection):
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
    """The last step that the run has trained, as far as anything in its directory says."""
    reached = [step for step, fact in facts.items() if fact.num_minibatches]
    reached += [int(path.name[-8:]) for path in Checkpoints(run_dir.checkpoints).all()]
    if run_dir.metrics_path.is_file():
        reached += [row["step"] for row in read_metrics(run_dir.metrics_path)]
    return max(reached, default=0)


def _claim(directory: Path, facts: dict[str, Any]) -> Path:
    """An empty directory for a replay; an older replay in its place goes."""
    directory = directory.expanduser().absolute()
    try:
        if directory.is_dir() and any(directory.iterdir()):
            if not (directory / _FACTS).is_file():
                raise ConfigError(
                    f"{directory} holds something that is no replay", "name an empty directory"
                )
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / _FACTS, json.dumps(facts, indent=2))
    except OSError as error:
        raise StorageError(f"cannot write {directory}: {error}") from error
    return directory


def _changes(run_dir: RunDir) -> list[str]:
    path = run_dir.events_path
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    changes = [line for line in lines if '"config_changed"' in line and line.endswith("\n")]
    events = [json.loads(line) for line in changes]
    return [e["change"] for e in events if e["change"].startswith(_STEP_KEYS)]


def read_step(path: Path) -> StepBatch:
    """A step's plan as it was trained; its payloads are the groups themselves.

    Dataset columns, seeds and sampling settings are not stored: the groups' requests lack them.

    Raises:
        StorageError: the file cannot be read.
    """
    table, facts = read_file(path)
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["group_id"], []).append(row)
    samples: list[list[tuple[int, PlannedSample]]] = [[] for _ in range(facts.num_minibatches)]
    payloads = {}
    for group_id, rows in groups.items():
        planned = [row for row in rows if row["minibatch"] is not None]
        if planned:
            payloads[group_id] = _group(rows)
        for row in planned:
            samples[row["minibatch"]].append((row["position"], _planned(row)))
    return StepBatch(
        step=facts.step - 1,
        minibatches=tuple(
            tuple(sample for _, sample in sorted(batch, key=lambda pair: pair[0]))
            for batch in samples
        ),
        payloads=payloads,
        versions={group_id: _span(group) for group_id, group in payloads.items()},
        has_signal=facts.has_signal,
    )


def _planned(row: Mapping[str, Any]) -> PlannedSample:
    return PlannedSample(
        group_id=row["group_id"],
        completion_index=row["completion_index"],
        prompt_length=len(row["prompt_token_ids"]),
        completion_length=len(row["token_ids"]),
        num_loss_tokens=row["num_loss_tokens"],
        advantage=row["advantage"],
        loss_weight=row["loss_weight"],
    )


def _group(rows: Sequence[Mapping[str, Any]]) -> Group:
    first = rows[0]
    completions = tuple(_completion(row) for row in rows)
    prompt = Prompt(
        id=first["prompt_id"],
        token_ids=np.array(first["prompt_token_ids"], np.int32),
        text=None if first["chat"] else first["prompt"],
        messages=tuple(json.loads(first["prompt"])) if first["chat"] else None,
        source=first["source"],
    )
    request = GroupRequest(
        stream=first["stream"],
        group_id=first["group_id"],
        attempt=first["attempt"],
        prompt=prompt,
        seed=0,
        sampling=Sampling(
            num_completions=len(rows), max_tokens=max(len(row["token_ids"]) for row in rows)
        ),
        min_version=min(completion.oldest for completion in completions),
    )
    return Group(request=request, completions=completions, generate_s=first["generate_s"])


def _completion(row: Mapping[str, Any]) -> Completion:
    columns = ("version_incarnations", "version_steps", "version_counts")
    runs = zip(*(row[name] for name in columns), strict=True)
    return Completion(
        token_ids=np.array(row["token_ids"], np.int32),
        logprobs=np.array(row["sampler_logprobs"], np.float32),
        loss_mask=np.array(row["loss_mask"], np.bool_),
        text=row["completion"],
        finish=row["finish"],
        version_runs=tuple((Version(incarnation, step), n) for incarnation, step, n in runs),
    )


def _span(group: Group) -> tuple[Version, Version]:
    return (
        min(completion.oldest for completion in group.completions),
        max(completion.newest for completion in group.completions),
    )
