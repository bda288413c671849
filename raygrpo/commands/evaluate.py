"""Generators and scorers without a learner: `raygrpo eval` and `raygrpo generate`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raygrpo.actors import futures
from raygrpo.actors.cluster.connect import placing
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.algorithm.window import train_request
from raygrpo.checks.checked import Checked, check
from raygrpo.commands.scope import Scope, open_scope
from raygrpo.commands.signals import Stopped, StopSignals
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.data.prompts import PromptStream
from raygrpo.errors import ConfigError
from raygrpo.rewards.budget import ScoreBudget
from raygrpo.rewards.contract import TrainerState
from raygrpo.storage.checkpoint import find_checkpoint, open_run, verify
from raygrpo.storage.rollouts import FileFacts, file_path, files, make_table, write_file
from raygrpo.storage.run_dir import write_atomically
from raygrpo.tracking.metrics import completion_metrics, reward_metrics
from raygrpo.training.evaluation import Evaluation
from raygrpo.training.wiring import Pool
from raygrpo.types import FinishedGroup, GroupRequest, Prompt, Version

OnEvent = Callable[[str, Mapping[str, Any]], None]
_LOADED = Version(0, 0)  # what generators call the weights that they read from disk
_TICK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """An evaluation on its own; ``step`` is 0 for the configured model."""

    model: str
    step: int
    num_prompts: int
    num_completions: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Groups generated and scored; ``path`` is the Parquet file that holds them."""

    model: str
    path: Path
    num_groups: int
    seconds: float
    metrics: dict[str, float]


def resolve_target(
    target: Path, step: int | str | None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, int]:
    """The configuration whose model is to be used, and the steps that the model was trained.

    ``target`` is a configuration file, or a run's directory: then the model is that of a
    checkpoint (a step, ``best`` or ``last``; None: the best if there is one, else the last).

    Raises:
        ConfigError: there is no such file, run or checkpoint.
        StorageError: the checkpoint does not verify.
    """
    if not target.is_dir():
        if step is not None:
            raise ConfigError(f"{target} is no run: it has no checkpoints", "leave --step out")
        return load_config(target, overrides), 0
    run_dir = open_run(target)
    # The configuration as it was given: this machine may have other threads and another engine.
    config = load_config(run_dir.given_path, overrides)
    path = find_checkpoint(run_dir, step)
    trained = int(verify(path)["step"])
    model = {"path": str(path / "model"), "revision": None, "random_init": False}
    sections = {"run_dir": str(run_dir.root), "model": config.model.model_copy(update=model)}
    return config.model_copy(update=sections), trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Generators and scorers that serve the weights of ``model.path``; there is no learner.

    Attributes:
        trained: the steps that the model was trained, which reward functions may ask for.
        on_event: gets the pool's events, and ``group`` with the counts after each group.
    """

    config: RunConfig
    trained: int
    pool: Pool
    signals: StopSignals
    on_event: OnEvent

    def roll(
        self, requests: Sequence[GroupRequest], drop: Callable[[], None] = lambda: None
    ) -> Iterator[FinishedGroup]:
        """Yields groups as they finish; ``drop`` is called for each that cannot be served.

        Raises:
            RewardError: too many scores failed.
            Stopped: a signal came.
        """
        state = TrainerState(global_step=self.trained, max_steps=self.config.train.steps)
        num_waiting, asked = len(requests), threading.Event()
        budget = ScoreBudget(
            max_error_frac=self.config.scorers.max_reward_error_frac,
            num_planned=sum(request.sampling.num_completions for request in requests),
        )
        for request in requests:
            self.pool.submit(request)
        while num_waiting:
            # `Stopped` is raised between two waits: inside a wait the exception would leave Ray's
            # own state half changed.
            with self.signals.during(asked.set):
                done = self.pool.wait([], _TICK_S, state)
            if asked.is_set():
                raise Stopped("stopped by a signal")
            for kind, fields in done.events:
                self.on_event(kind, fields)
            for _ in done.dropped:
                num_waiting -= 1
                drop()
            for group in done.groups:
                num_waiting -= 1
                budget.take(group.summary.scores, group.traceback)
                counts = {"finished": len(requests) - num_waiting, "of": len(requests)}
                self.on_event("group", counts)
                yield group


def serve(checked: Checked, trained: int, scope: Scope, on_event: OnEvent) -> Rollouts:
    """Starts generators and scorers for a model that was trained so many steps."""
    cluster = scope.join(checked.config, roles=["generator", "scorer"])
    pool = RolloutPool(
        cluster.config, None, checked.functions, Site(local=cluster.connection.local)
    )
    scope.closers.callback(pool.close)
    with placing(cluster.connection):
        pool.start(normal_gap=None)
    on_event("started", {})
    return Rollouts(
        config=cluster.config, trained=trained, pool=pool, signals=scope.signals, on_event=on_event
    )


def evaluate_prompts(rollouts: Rollouts, prompts: Sequence[Prompt]) -> Evaluated:
    """Evaluates the served model as a training run does.

    Raises:
        RewardError: too many scores failed.
    """
    started = time.monotonic()
    evaluation = Evaluation(prompts, _LOADED, rollouts.config)
    for group in rollouts.roll(evaluation.requests, evaluation.drop):
        evaluation.finish(group.summary)
    return Evaluated(
        model=rollouts.config.model.path,
        step=rollouts.trained,
        num_prompts=len(prompts),
        num_completions=rollouts.config.eval.num_completions,
        seconds=time.monotonic() - started,
        metrics=evaluation.metrics(),
    )


def generate_groups(
    rollouts: Rollouts, prompts: PromptStream, num_groups: int, out: Path
) -> Generated:
    """Generates and scores the first groups of a training run, and writes them to ``out``.

    Raises:
        RewardError: too many scores failed.
        StorageError: the file cannot be written.
    """
    requests = [
        train_request(rollouts.config, group_id, prompts.next(), _LOADED)
        for group_id in range(num_groups)
    ]
    started = time.monotonic()
    rolled = sorted(rollouts.roll(requests), key=lambda group: group.summary.group_id)
    seconds = time.monotonic() - started
    payloads = {
        group.summary.group_id: futures.resolve(group.payload, "a generated group")
        for group in rolled
    }
    summaries = [group.summary for group in rolled]
    decided = [
        replace(group, fate="generated" if group.teaches else "no_signal") for group in rolled
    ]
    path = file_path(out, "step", 0)
    facts = FileFacts(step=0, complete=len(rolled) == num_groups)
    write_file(path, make_table(0, decided, payloads, ()), facts)
    num_tokens = sum(sum(summary.lengths) for summary in summaries)
    return Generated(
        model=rollouts.config.model.path,
        path=path,
        num_groups=len(rolled),
        seconds=seconds,
        metrics={
            **reward_metrics(summaries),
            **completion_metrics(summaries),
            "frac_groups_with_signal": sum(g.teaches for g in rolled) / max(len(rolled), 1),
            "num_dropped": float(num_groups - len(rolled)),
            "tokens_per_s": num_tokens / seconds,
        },
    )


def evaluate(
    target: Path,
    step: int | str | None = None,
    overrides: Sequence[str] = (),
    on_event: OnEvent = lambda *_: None,
    out: Path | None = None,
) -> Evaluated:
    """Evaluates the model of a configuration or of a run's checkpoint; see `resolve_target`.

    ``out`` is a file for the numbers, as JSON.
    """
    config, trained = resolve_target(target, step, overrides)
    if not config.eval.eval_steps:  # the run does not evaluate, but we do
        section = config.eval.model_copy(update={"eval_steps": 1})
        config = config.model_copy(update={"eval": section})
    with open_scope() as scope:
        checked = check(config)
        rollouts = serve(checked, trained, scope, on_event)
        found = evaluate_prompts(rollouts, checked.eval_prompts)
    if out is not None:
        write_atomically(out, json.dumps(asdict(found), indent=2) + "\n")
    return found


def generate(
    target: Path,
    *,
    num_groups: int | None,
    out: Path,
    step: int | str | None = None,
    overrides: Sequence[str] = (),
    on_event: OnEvent = lambda *_: None,
) -> Generated:
    """Generates a training run's first groups (one step's, unless ``num_groups`` says otherwise)
    with the model of a configuration or of a run's checkpoint; see `resolve_target`."""
    config, trained = resolve_target(target, step, overrides)
    if files(out, "step"):
        raise ConfigError(f"{out} holds completions already", "name another --out")
    with open_scope() as scope:
        checked = check(config)
        rollouts = serve(checked, trained, scope, on_event)
        number = num_groups or config.train.groups_per_step
        return generate_groups(rollouts, checked.prompts, number, out)
