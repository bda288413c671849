"""A whole run: check everything, start the actors, train, export."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from raygrpo.checks.warnings import start_events
from raygrpo.commands.export import export_checkpoint
from raygrpo.commands.signals import StopSignals
from raygrpo.config import RewardSection, RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, RayGrpoError, StorageError
from raygrpo.storage.checkpoint import Checkpoints, verify
from raygrpo.storage.run_dir import RunDir
from raygrpo.training.evaluation import check_best_metric
from raygrpo.training.state import BestSoFar, RunState, load_state
from raygrpo.types import Prompt

RewardCallable = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended; not ``finished`` after an orderly stop, which the same command resumes."""

    finished: bool
    run_dir: Path
    export: Path | None
    metrics: dict[str, float]
    driver_ms_per_group: float
    first_group_s: float


def train(
    config: RunConfig | Mapping[str, Any] | Path | str,
    *,
    reward_funcs: Sequence[RewardCallable] | RewardCallable = (),
    dataset: Any = None,
    eval_dataset: Any = None,
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
    funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    resolved, functions = _resolve(config, funcs, dataset is not None, overrides)
    with Session(resolved, functions, dataset, eval_dataset) as session:
        session.prepare()
        return session.run()


def _resolve(
    config: RunConfig | Mapping[str, Any] | Path | str,
    funcs: Sequence[RewardCallable],
    has_dataset: bool,
    overrides: Sequence[str],
) -> tuple[RunConfig, dict[str, bytes]]:
    from raygrpo.rewards.loading import pack_function

    if not isinstance(config, RunConfig):
        if has_dataset and isinstance(config, Mapping):
            config = {**config, "data": {"source": "python", **config.get("data", {})}}
        config = load_config(config, overrides)
    if not funcs:
        return config, {}
    names = [getattr(func, "__name__", type(func).__name__) for func in funcs]
    if len(set(names)) != len(names):
        raise ConfigError(f"reward functions need distinct names, not {names}")
    sections = [RewardSection(func=name, name=name) for name in names]
    functions = {name: pack_function(func) for name, func in zip(names, funcs, strict=True)}
    return config.model_copy(update={"rewards": sections}), functions


class Session:
    """One run from its checks to its export; a context manager that leaves nothing behind."""

    def __init__(
        self,
        config: RunConfig,
        functions: Mapping[str, bytes] | None = None,
        dataset: Any = None,
        eval_dataset: Any = None,
        *,
        profile_step: int | None = None,
    ) -> None:
        self.config = config
        self._profile_step = profile_step
        self.started = False
        self._functions = dict(functions or {})
        self._dataset = dataset
        self._eval_dataset = eval_dataset
        self._born = time.time()
        self._signals = StopSignals()
        self._closers = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._signals.install()
        self._closers.callback(self._signals.uninstall)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._signals.during(lambda: None):  # it is ending
            self._closers.close()

    def prepare(self) -> None:
        """Everything that can fail before the first step: checks first, then data, then actors."""
        from raygrpo.learner.deepspeed_config import check_learner

        check_learner(self.config)
        self.check()
        self.run_dir = RunDir.claim(self.config)
        self._closers.callback(self.run_dir.release)
        self.run_dir.note(revisions=dict(self._pinned.revisions), example=self._example())
        self._find_checkpoint()
        self._order_profile()
        if self._complete:
            self._start_tracking()
        else:
            self._start_actors(self._anchored)

    def check(self) -> None:
        """What can be found wrong without a run directory or an actor; loads the prompts."""
        from raygrpo.actors.cluster.placement import check_run_dir, check_transfer
        from raygrpo.checks.revisions import pin
        from raygrpo.engines.select import check_engine
        from raygrpo.models import anchored_model, check_model_path, load_tokenizer
        from raygrpo.rewards.loading import anchor_reward, check_reward
        from raygrpo.tracking.tensorboard import check_tensorboard

        config = self.config
        for check in (check_run_dir, check_transfer, check_engine, check_tensorboard):
            check(config)
        if not config.rewards:
            raise ConfigError("no rewards", "set rewards, or pass reward_funcs")
        for reward in config.rewards:
            check_reward(reward, passed=self._functions)
        # Paths are relative to here, not to wherever an actor runs.
        self._anchored = [anchor_reward(reward) for reward in config.rewards]
        check_best_metric(config)
        check_model_path(config.model)
        given = {"data": self._dataset, "eval": self._eval_dataset}
        passed = [role for role, dataset in given.items() if dataset is not None]
        self._pinned = pin(config, RunDir.at(config).revisions, passed)
        config = self._pinned.config
        self._placed = config.model_copy(update={"model": anchored_model(config.model)})
        self._tokenizer = load_tokenizer(config.model)
        self._load_data()

    @property
    def _complete(self) -> bool:
        """Whether an earlier start trained all steps: then only the export is left to write."""
        state = self._restored
        if state is None or state.record is not None:
            return False
        return state.step >= self.config.train.steps or state.best.has_ended(self.config)

    def run(self) -> Outcome:
        """Trains, then exports; SIGTERM and SIGINT stop in order, the running step committed."""
        if self._restored is not None and self._complete:
            return self._end(self._restored.step, finished=True)
        from raygrpo.training.trainer import Trainer
        from raygrpo.training.wiring import Wiring

        trainer = Trainer(
            Wiring(
                config=self.config,
                pool=self._pool,
                learner=self._learner,
                prompts=self._prompts,
                eval_prompts=self._eval_prompts,
                tracker=self._tracker,
                rollouts=self._rollouts,
                run_dir=self.run_dir,
                checkpoints=self._checkpoints,
                incarnation=self._incarnation,
            ),
            self._restored,
        )
        self.started = True
        with self._signals.during(trainer.stop):  # to the end: nothing after it is undone
            try:
                finished = trainer.run()
            except RayGrpoError as error:
                self._note_failure(trainer.step, error)
                raise
            timing = {
                "driver_ms_per_group": 1e3 * trainer.driver_s_per_group,
                "first_group_s": (trainer.first_group_at or self._born) - self._born,
            }
            self._tracker.event("run_end", step=trainer.step, finished=finished, **timing)
            return self._end(trainer.step, finished=finished, **timing)

    def _note_failure(self, step: int, error: RayGrpoError) -> None:
        kind = type(error).__name__
        with contextlib.suppress(StorageError):  # the first error matters, not a full disk
            self._tracker.event("run_failed", step=step, type=kind, error=str(error))

    def _end(
        self,
        step: int,
        *,
        finished: bool,
        driver_ms_per_group: float = 0.0,
        first_group_s: float = 0.0,
    ) -> Outcome:
        # A signal from here on has nothing left to save: what is under way just ends.
        with self._signals.during(lambda: None):
            export = self._export(step) if finished else None
            self._tracker.close(exit_code=0 if finished else 1)
        return Outcome(
            finished=finished,
            run_dir=self.run_dir.root,
            export=export,
            metrics=self._tracker.last_metrics,
            driver_ms_per_group=driver_ms_per_group,
            first_group_s=first_group_s,
        )

    def _load_data(self) -> None:
        from raygrpo.data.loading import make_prompts
        from raygrpo.data.sources import eval_section

        config, seed = self._pinned.config, self.config.seed
        tokenizer, given = self._tokenizer, self._dataset
        self._prompts = make_prompts(config.data, tokenizer, seed=seed, dataset=given)
        self._sources = {"train": self._prompts}
        self._eval_prompts: list[Prompt] = []
        if config.eval.eval_steps:
            section = eval_section(config.data, config.eval, seed=seed)
            given = self._eval_dataset
            source = make_prompts(section, tokenizer, seed=seed, stream="eval", dataset=given)
            self._sources["eval"] = source
            self._eval_prompts = source.take(config.eval.num_prompts)

    def _find_checkpoint(self) -> None:
        self._checkpoints = Checkpoints(self.run_dir.checkpoints, self.config.checkpoint.keep)
        path, problems = self._checkpoints.newest_valid()
        if path is None and problems:
            raise StorageError(
                f"no checkpoint of {self.run_dir.root} verifies: {'; '.join(problems)}",
                "bring them back, or remove checkpoints/ to start again from step 0",
            )
        self._restored_from = path
        self._refused = problems
        self._restored: RunState | None = load_state(path) if path else None
        best = self._find_best()
        if self._restored:
            self._restored = replace(self._restored, best=best)
            self._prompts.restore(self._restored.prompts)
        self._incarnation = self.run_dir.next_incarnation()

    def _find_best(self) -> BestSoFar:
        """The best evaluation of the restored state, if its checkpoint is still there."""
        best = BestSoFar(metric=self.config.eval.best.metric or "")
        if self._restored:
            best = self._restored.best.resumed(self.config)
        if best.step >= 0 and self._checkpoints.path(best.step) != self._restored_from:
            try:
                verify(self._checkpoints.path(best.step))
            except StorageError as error:
                self._refused.append(f"the best one: {error}")
                best = BestSoFar(metric=best.metric)
        if best.metric or "best" in self.run_dir.facts:
            self.run_dir.note(best=best.fact())
        return best

    def _order_profile(self) -> None:
        from raygrpo.actors.profiling import order_profile

        self._profile = None
        if self._profile_step is not None:
            done = self._restored.step if self._restored else 0
            self._profile = order_profile(
                self.run_dir.root, self._profile_step, done=done, steps=self.config.train.steps
            )

    def _start_tracking(self) -> None:
        """After all checks: it cuts off the metrics after the checkpoint."""
        from raygrpo.tracking.tracker import Tracker

        step = self._restored.step if self._restored else 0
        resume_step = step if self._restored else None
        if self._restored and self._restored.record is not None:
            resume_step = step - 1  # its row is logged again, and may have been before
        self._tracker = Tracker(
            self.run_dir.root, self.config, resume_step=resume_step, profile=self._profile
        )
        self._closers.callback(self._tracker.close)
        for kind, fields in start_events(
            self._placed,
            refused=self._refused,
            changed=self.run_dir.changed,
            revisions=self._pinned.changed,
            sources=self._sources,
        ):
            self._tracker.event(kind, step=step, **fields)
        if self._restored:
            self._tracker.event("resumed", step=step, incarnation=self._incarnation)

    def _start_actors(self, rewards: Sequence[RewardSection]) -> None:
        from raygrpo.actors.cluster.colocation import Colocation
        from raygrpo.actors.cluster.connect import connect, disconnect, placing
        from raygrpo.actors.cluster.engine_probe import settle_engine
        from raygrpo.actors.cluster.placement import demand_of, labels_of
        from raygrpo.actors.weight_store import start_store

        with self._signals.kept():
            connection = connect(self._placed, demand_of(self._placed))
            self._closers.callback(disconnect, connection)
        self._placed, choice = settle_engine(
            connection.config, self.run_dir.engine, local=connection.local
        )
        self.run_dir.note(engine=choice.engine)
        store = start_store(
            labels_of(self._placed, "learner"), timeout_s=self._placed.ray.timeouts_s.sync
        )
        self._closers.callback(store.close)
        # Elsewhere the run directory may not exist: there, output stays in Ray's own logs.
        where: dict[str, Any] = {
            "local": connection.local,
            "logs": self.run_dir.logs if connection.local else None,
            "profile": self._profile,
            "places": Colocation(self._placed, local=connection.local),
        }
        self._closers.callback(where["places"].close)
        self._learner, self._pool = self._make_workers(store, rewards, where)
        self._closers.callback(self._learner.close)
        self._closers.callback(self._pool.close)
        with placing(connection):
            starting = self._learner.start()
            self._start_tracking()  # while the actors start
            if self.config.generators.engine == "auto":
                self._tracker.event("engine", name=choice.engine, reason=choice.reason)
            self._open_store(where["logs"])
            self._pool.start(self._restored.normal_gap if self._restored else None)
            self.pids = {f"learner-{rank}": pid for rank, pid in enumerate(starting.wait())}
        self.pids |= self._pool.pids
        self._tracker.event("started", step=0, pids=self.pids, seconds=time.time() - self._born)
        if self._restored_from is not None:
            self._learner.load(self._restored_from).wait()

    def _make_workers(self, store: Any, rewards: Sequence[RewardSection], where: Any) -> Any:
        from raygrpo.actors.learner import LearnerGroup
        from raygrpo.actors.pool.pool import RolloutPool

        learner = LearnerGroup(self._placed, store, **where)
        return learner, RolloutPool(self._placed, store, rewards, self._functions, **where)

    def _example(self) -> str | list[dict[str, Any]]:
        """The first prompt, for the quick start of the model's card."""
        first = self._prompts.take(1)[0]
        return first.text if first.text is not None else [dict(m) for m in first.messages or ()]

    def _open_store(self, logs: Path | None) -> None:
        from raygrpo.actors.rollout_writer import RolloutLog
        from raygrpo.storage.rollouts import roll_back

        directory, state = self.run_dir.completions, self._restored
        step, window = (state.step, state.window) if state else (-1, None)
        roll_back(directory, step, lambda i: window is not None and window.has_decided(i))
        self._rollouts = RolloutLog(
            self.config,
            directory,
            on_event=self._tracker.event,
            on_sample=self._tracker.log_completions,
            logs=logs,
        )
        self._closers.callback(self._rollouts.close)

    def _export(self, step: int) -> Path:
        best = self.run_dir.best_step
        path = self._checkpoints.path(step if best is None else best)
        return export_checkpoint(self.run_dir, path, self.config, self._tokenizer, self._example())
