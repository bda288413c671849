"""A whole run: check, claim the run directory, restore, start the actors, train, export.

Each stage is a function, and its value goes into the next one:

    check -> Checked -> claim, prepare -> Prepared -> join -> Cluster -> start -> Wiring -> Trainer
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raygrpo.actors.cluster.colocation import Colocation
from raygrpo.actors.cluster.connect import placing
from raygrpo.actors.cluster.placement import labels_of
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.learner import LearnerGroup
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.profiling import ProfileRequest, order_profile
from raygrpo.actors.rollout_writer import RolloutLog
from raygrpo.actors.weight_store import StoreHandle, start_store
from raygrpo.checks.checked import Checked, Rows, check
from raygrpo.checks.resolved import resolve, this_machine
from raygrpo.checks.warnings import start_events
from raygrpo.commands.export import export_checkpoint
from raygrpo.commands.scope import Cluster, Scope, open_scope
from raygrpo.commands.signals import StopSignals
from raygrpo.config import RewardSection, RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, RayGrpoError, StorageError
from raygrpo.rewards.loading import pack_function
from raygrpo.storage.checkpoint import Checkpoints, verify
from raygrpo.storage.rollouts import roll_back
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.tracker import Tracker
from raygrpo.training.state import BestSoFar, RunState, load_state
from raygrpo.training.trainer import Trainer
from raygrpo.training.wiring import Wiring

RewardCallable = Callable[..., Any]
MakeWorkers = Callable[
    [RunConfig, StoreHandle, Mapping[str, bytes], Site], tuple[LearnerGroup, RolloutPool]
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended; not ``finished`` after an orderly stop, which the same command resumes."""

    finished: bool
    run_dir: Path
    export: Path | None
    metrics: dict[str, float]
    driver_ms_per_group: float = 0.0
    first_group_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that may start: at its newest checkpoint, or at step 0.

    Attributes:
        run_dir: the run's directory, which this process holds.
        state: the driver's state of the checkpoint; None for a run from step 0.
        checkpoint: the checkpoint's directory; None for a run from step 0.
        refused: why checkpoints were passed over.
        incarnation: how many starts the learner has had, this one included.
        profile: the step to trace.
    """

    checked: Checked
    run_dir: RunDir
    checkpoints: Checkpoints
    state: RunState | None
    checkpoint: Path | None
    refused: Sequence[str]
    incarnation: int
    profile: ProfileRequest | None

    @property
    def step(self) -> int:
        """Steps that are trained."""
        return self.state.step if self.state else 0

    @property
    def is_complete(self) -> bool:
        """Whether all steps are trained: then only the export is left to write."""
        if self.state is None or self.state.record is not None:
            return False
        config = self.checked.config
        return self.step >= config.train.steps or self.state.best.has_ended(config)


def train(
    config: RunConfig | Mapping[str, Any] | Path | str,
    *,
    reward_funcs: Sequence[RewardCallable] | RewardCallable = (),
    dataset: Rows = None,
    eval_dataset: Rows = None,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Trains a model as ``config`` says, or resumes the run in its directory.

    Args:
        config: a configuration, a mapping of one, or the path of its YAML file.
        reward_funcs: callables in place of ``rewards``, called as TRL calls them; closures may be
            passed.
        dataset: a `datasets.Dataset` in place of ``data.source``.
        eval_dataset: the same for the evaluation.
        overrides: ``section.key=value`` strings.

    Raises:
        RayGrpoError: what is wrong, and what to do about it.
    """
    if not isinstance(config, RunConfig):
        if dataset is not None and isinstance(config, Mapping):
            config = {**config, "data": {"source": "python", **config.get("data", {})}}
        config = load_config(config, overrides)
    funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    names = [getattr(func, "__name__", type(func).__name__) for func in funcs]
    if len(set(names)) != len(names):
        raise ConfigError(f"reward functions need distinct names, not {names}")
    if funcs:
        sections = [RewardSection(func=name, name=name) for name in names]
        config = config.model_copy(update={"rewards": sections})
    functions = {name: pack_function(func) for name, func in zip(names, funcs, strict=True)}
    return run(config, functions, dataset, eval_dataset)


def make_workers(
    config: RunConfig, store: StoreHandle, functions: Mapping[str, bytes], site: Site
) -> tuple[LearnerGroup, RolloutPool]:
    """The learner and the pool of generators and scorers; their processes are starting."""
    return LearnerGroup(config, store, site), RolloutPool(config, store, functions, site)


def run(
    config: RunConfig,
    functions: Mapping[str, bytes] | None = None,
    dataset: Rows = None,
    eval_dataset: Rows = None,
    *,
    profile_step: int | None = None,
    make_workers: MakeWorkers = make_workers,
    on_start: Callable[[], None] = lambda: None,
) -> Outcome:
    """Trains a model; SIGTERM and SIGINT stop in order, the running step committed.

    Args:
        config: the configuration as the user wrote it.
        functions: pickled reward functions, by name, in place of ``rewards``.
        dataset: as in `train`.
        eval_dataset: as in `train`.
        profile_step: the step to trace.
        make_workers: makes the learner and the pool; benchmarks put simulated ones in their place.
        on_start: called when everything has been found right and the first step begins.

    Raises:
        RayGrpoError: what is wrong, and what to do about it.
    """
    born = time.time()
    with open_scope() as scope:
        checked = check(config, functions, dataset, eval_dataset)
        prepared = prepare(checked, claim(checked, scope), profile_step)
        if prepared.is_complete:
            whole = resolve(checked.config, this_machine(checked.config)).config
            tracker = start_tracking(whole, prepared, scope)
            finish = functools.partial(export, whole, prepared, prepared.step)
            return end(prepared.run_dir, tracker, scope.signals, finish)
        cluster = scope.join(checked.config, recorded=prepared.run_dir.engine)
        prepared.run_dir.write_config(cluster.config)
        prepared.run_dir.note(engine=cluster.config.generators.engine)
        wiring, tracker = start(prepared, cluster, scope, make_workers, born)
        on_start()
        return drive(
            Trainer(wiring, prepared.state),
            prepared.run_dir,
            tracker,
            scope.signals,
            functools.partial(export, cluster.config, prepared),
            born,
        )


def claim(checked: Checked, scope: Scope) -> RunDir:
    """Holds the run's directory, and notes the revisions and a prompt for the model's card."""
    run_dir = RunDir.claim(checked.given)
    scope.closers.callback(run_dir.release)
    first = checked.prompts.take(1)[0]
    example = first.text if first.text is not None else [dict(m) for m in first.messages or ()]
    run_dir.note(revisions=dict(checked.revisions), example=example)
    return run_dir


def prepare(checked: Checked, run_dir: RunDir, profile_step: int | None) -> Prepared:
    """Finds the newest checkpoint that verifies, and moves the prompts to its place.

    Raises:
        ConfigError: the step to trace is none of those that are left.
        StorageError: there are checkpoints, and none verifies.
    """
    config = checked.config
    checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoint.keep)
    path, refused = checkpoints.newest_valid()
    if path is None and refused:
        raise StorageError(
            f"no checkpoint of {run_dir.root} verifies: {'; '.join(refused)}",
            "bring them back, or remove checkpoints/ to start again from step 0",
        )
    state = load_state(path) if path else None
    best, missing = _find_best(config, checkpoints, state, path)
    if best.metric or "best" in run_dir.facts:
        run_dir.note(best=best.fact())
    if state:
        state = replace(state, best=best)
        checked.prompts.restore(state.prompts)
    profile = None
    if profile_step is not None:
        done, steps = state.step if state else 0, config.train.steps
        profile = order_profile(run_dir.root, profile_step, done=done, steps=steps)
    return Prepared(
        checked=checked,
        run_dir=run_dir,
        checkpoints=checkpoints,
        state=state,
        checkpoint=path,
        refused=[*refused, *missing],
        incarnation=run_dir.next_incarnation(),
        profile=profile,
    )


def _find_best(
    config: RunConfig, checkpoints: Checkpoints, state: RunState | None, path: Path | None
) -> tuple[BestSoFar, list[str]]:
    """The best evaluation of the restored state, and why its checkpoint does not verify."""
    best = state.best.resumed(config) if state else BestSoFar(metric=config.eval.best.metric or "")
    if best.step >= 0 and checkpoints.path(best.step) != path:
        try:
            verify(checkpoints.path(best.step))
        except StorageError as error:
            return BestSoFar(metric=best.metric), [f"the best one: {error}"]
    return best, []


def start_tracking(config: RunConfig, prepared: Prepared, scope: Scope) -> Tracker:
    """Opens the records, which cuts off the metrics after the checkpoint; tells of the start."""
    resume_step = prepared.step if prepared.state else None
    if prepared.state and prepared.state.record is not None:
        resume_step = prepared.step - 1  # its row is logged again, and may have been before
    root = prepared.run_dir.root
    tracker = Tracker(root, config, resume_step=resume_step, profile=prepared.profile)
    scope.closers.callback(tracker.close)
    for kind, fields in start_events(
        config,
        refused=prepared.refused,
        changed=prepared.run_dir.changed,
        revisions=prepared.checked.revision_changes,
        sources=prepared.checked.sources,
    ):
        tracker.event(kind, step=prepared.step, **fields)
    if prepared.state:
        tracker.event("resumed", step=prepared.step, incarnation=prepared.incarnation)
    return tracker


def start(
    prepared: Prepared, cluster: Cluster, scope: Scope, make_workers: MakeWorkers, born: float
) -> tuple[Wiring, Tracker]:
    """Starts all actors and records of a run; the learner holds the checkpoint's state."""
    config, checked, closers = cluster.config, prepared.checked, scope.closers
    local = cluster.connection.local
    site = Site(
        local=local,
        # Elsewhere the run directory may not exist: there, output stays in Ray's own logs.
        logs=prepared.run_dir.logs if local else None,
        profile=prepared.profile,
        places=Colocation(config, local=local),
    )
    store = start_store(labels_of(config, "learner"), timeout_s=config.ray.timeouts_s.sync)
    closers.callback(store.close)
    if site.places:
        closers.callback(site.places.close)
    learner, pool = make_workers(config, store, checked.functions, site)
    closers.callback(learner.close)
    closers.callback(pool.close)
    with placing(cluster.connection):
        starting = learner.start()
        tracker = start_tracking(config, prepared, scope)  # while actors start
        if checked.given.generators.engine == "auto":
            choice = cluster.resolved.facts.engine
            tracker.event("engine", name=choice.engine, reason=choice.reason)
        rollouts = _open_rollouts(config, prepared, tracker, site.logs)
        closers.callback(rollouts.close)
        pool.start(prepared.state.normal_gap if prepared.state else None)
        pids = {f"learner-{rank}": pid for rank, pid in enumerate(starting.wait())}
    tracker.event("started", step=0, pids=pids | pool.pids, seconds=time.time() - born)
    if prepared.checkpoint is not None:
        learner.load(prepared.checkpoint).wait()
    wiring = Wiring(
        config=config,
        pool=pool,
        learner=learner,
        prompts=checked.prompts,
        eval_prompts=checked.eval_prompts,
        tracker=tracker,
        rollouts=rollouts,
        run_dir=prepared.run_dir,
        checkpoints=prepared.checkpoints,
        incarnation=prepared.incarnation,
    )
    return wiring, tracker


def _open_rollouts(
    config: RunConfig, prepared: Prepared, tracker: Tracker, logs: Path | None
) -> RolloutLog:
    """The rollout store, without the groups that the run generates again."""
    state = prepared.state
    step, window = (state.step, state.window) if state else (-1, None)
    directory = prepared.run_dir.completions
    roll_back(directory, step, lambda i: window is not None and window.has_decided(i))
    return RolloutLog(
        config, directory, on_event=tracker.event, on_sample=tracker.log_completions, logs=logs
    )


def drive(
    trainer: Trainer,
    run_dir: RunDir,
    tracker: Tracker,
    signals: StopSignals,
    export: Callable[[int], Path],
    born: float,
) -> Outcome:
    """Runs the loop, then exports; the first signal commits the running step and ends the run."""
    with signals.during(trainer.stop):  # to the end: nothing after the loop is undone
        try:
            finished = trainer.run()
        except RayGrpoError as error:
            kind = type(error).__name__
            with contextlib.suppress(StorageError):  # the first error matters, not a full disk
                tracker.event("run_failed", step=trainer.step, type=kind, error=str(error))
            raise
        driver_ms = 1e3 * trainer.driver_s_per_group
        first_group_s = (trainer.first_group_at or born) - born
        tracker.event(
            "run_end",
            step=trainer.step,
            finished=finished,
            driver_ms_per_group=driver_ms,
            first_group_s=first_group_s,
        )
        finish = functools.partial(export, trainer.step) if finished else None
        outcome = end(run_dir, tracker, signals, finish)
        return replace(outcome, driver_ms_per_group=driver_ms, first_group_s=first_group_s)


def end(
    run_dir: RunDir, tracker: Tracker, signals: StopSignals, export: Callable[[], Path] | None
) -> Outcome:
    """Exports the model of a finished run, and closes the records; None for a stopped run."""
    # A signal from here on has nothing left to save: whatever is under way just ends.
    with signals.during(lambda: None):
        exported = export() if export else None
        tracker.close(exit_code=0 if export else 1)
    return Outcome(
        finished=export is not None,
        run_dir=run_dir.root,
        export=exported,
        metrics=tracker.last_metrics,
    )


def export(config: RunConfig, prepared: Prepared, step: int) -> Path:
    """Exports the best checkpoint where evaluations chose one, else that of ``step``."""
    run_dir, best = prepared.run_dir, prepared.run_dir.best_step
    path = prepared.checkpoints.path(step if best is None else best)
    return export_checkpoint(run_dir, path, config)
