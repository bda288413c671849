"""Generators and scorers without a learner: `raygrpo eval` and `raygrpo generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raygrpo.algorithm.window import train_request
from raygrpo.commands.signals import Stopped
from raygrpo.commands.train import Session
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.errors import ConfigError, StorageError
from raygrpo.rewards.budget import ScoreBudget
from raygrpo.rewards.contract import TrainerState
from raygrpo.storage.checkpoint import find_checkpoint, open_run, verify
from raygrpo.storage.run_dir import write_atomically
from raygrpo.tracking.metrics import completion_metrics, reward_metrics
from raygrpo.training.evaluation import Evaluation
from raygrpo.types import FinishedGroup, Group, GroupRequest, Version

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
    config = load_config(run_dir.config_path, overrides)
    path = find_checkpoint(run_dir, step)
    trained = int(verify(path)["step"])
    model = {"path": str(path / "model"), "revision": None, "random_init": False}
    model_section = config.model.model_copy(update=model)
    return (
        config.model_copy(update={"run_dir": str(run_dir.root), "model": model_section}),
        trained,
    )


class RolloutSession(Session):
    """A session whose generators serve the weights that they read from ``model.path``."""

    def __init__(
        self, config: RunConfig, *, trained_steps: int = 0, on_event: OnEvent = lambda *_: None
    ) -> None:
        super().__init__(config)
        self._trained_steps = trained_steps
        self._on_event = on_event
        self._stopping = False

    def _stop(self) -> None:
        self._stopping = True

    def start(self) -> None:
        """Checks everything, then starts generators and scorers."""
        from raygrpo.actors.cluster.connect import connect, disconnect, placing
        from raygrpo.actors.cluster.engine_probe import settle_engine
        from raygrpo.actors.cluster.placement import demand_of, freed
        from raygrpo.actors.pool.pool import RolloutPool

        self.check()
        placed = freed(self._placed, "learner")
        with self._signals.kept():
            connection = connect(placed, demand_of(placed))
            self._closers.callback(disconnect, connection)
        placed, _ = settle_engine(connection.config, None, local=connection.local)
        self._pool = RolloutPool(
            placed, None, self._anchored, self._functions, local=connection.local
        )
        self._closers.callback(self._pool.close)
        with placing(connection):
            self._pool.start()
        self.started = True
        self._on_event("started", {})

    def evaluate(self) -> Evaluated:
        """Evaluates the model as a training run does.

        Raises:
            RewardError: too many scores failed.
        """
        started = time.monotonic()
        evaluation = Evaluation(self._eval_prompts, _LOADED, self.config)
        for group in self._roll(evaluation.requests, evaluation.drop):
            evaluation.finish(group.summary)
        return Evaluated(
            model=self.config.model.path,
            step=self._trained_steps,
            num_prompts=len(self._eval_prompts),
            num_completions=self.config.eval.num_completions,
            seconds=time.monotonic() - started,
            metrics=evaluation.metrics(),
        )

    def generate(self, num_groups: int, out: Path) -> Generated:
        """Generates and scores the first groups of a training run, and writes them to ``out``.

        Raises:
            RewardError: too many scores failed.
            StorageError: the file cannot be written.
        """
        from raygrpo.actors.futures import resolve

        requests = [
            train_request(self.config, group_id, self._prompts.next(), _LOADED)
            for group_id in range(num_groups)
        ]
        started = time.monotonic()
        rolled = sorted(self._roll(requests), key=lambda group: group.summary.group_id)
        seconds = time.monotonic() - started
        payloads = {
            group.summary.group_id: resolve(group.payload, "a generated group") for group in rolled
        }
        summaries = [group.summary for group in rolled]
        path = _write(out, rolled, payloads, complete=len(rolled) == num_groups)
        num_tokens = sum(sum(summary.lengths) for summary in summaries)
        return Generated(
            model=self.config.model.path,
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

    def _roll(
        self, requests: Sequence[GroupRequest], drop: Callable[[], None] = lambda: None
    ) -> Iterator[FinishedGroup]:
        """Yields groups as they finish; ``drop`` is called for each that cannot be served."""
        state = TrainerState(global_step=self._trained_steps, max_steps=self.config.train.steps)
        num_waiting = len(requests)
        budget = ScoreBudget(
            max_error_frac=self.config.scorers.max_reward_error_frac,
            num_planned=sum(request.sampling.num_completions for request in requests),
        )
        for request in requests:
            self._pool.submit(request)
        while num_waiting:
            # Noticed between two waits: an exception in the middle of Ray's own is none of ours.
            with self._signals.during(self._stop):
                done = self._pool.wait([], _TICK_S, state)
            if self._stopping:
                raise Stopped("stopped by a signal")
            for kind, fields in done.events:
                self._on_event(kind, fields)
            for _ in done.dropped:
                num_waiting -= 1
                drop()
            for group in done.groups:
                num_waiting -= 1
                budget.take(group.summary.scores, group.traceback)
                counts = {"finished": len(requests) - num_waiting, "of": len(requests)}
                self._on_event("group", counts)
                yield group


def evaluate(
    target: Path,
    step: int | str | None = None,
    overrides: Sequence[str] = (),
    on_event: OnEvent = lambda *_: None,
) -> Evaluated:
    """Evaluates the model of a configuration or of a run's checkpoint; see `resolve_target`."""
    config, trained = resolve_target(target, step, overrides)
    if not config.eval.eval_steps:  # the run does not evaluate, but we do
        section = config.eval.model_copy(update={"eval_steps": 1})
        config = config.model_copy(update={"eval": section})
    with RolloutSession(config, trained_steps=trained, on_event=on_event) as session:
        session.start()
        return session.evaluate()


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
    from raygrpo.storage.rollouts import files

    config, trained = resolve_target(target, step, overrides)
    if files(out, "step"):
        raise ConfigError(f"{out} holds completions already", "name another --out")
    with RolloutSession(config, trained_steps=trained, on_event=on_event) as session:
        session.start()
        return session.generate(num_groups or config.train.groups_per_step, out)


def write_json(path: Path, found: Evaluated) -> None:
    """Writes an evaluation's numbers.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        write_atomically(path, json.dumps(asdict(found), indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error


def _write(
    out: Path, rolled: Sequence[FinishedGroup], payloads: Mapping[int, Group], *, complete: bool
) -> Path:
    from raygrpo.storage.rollouts import FileFacts, file_path, make_table, write_file

    decided = [
        replace(group, fate="generated" if group.teaches else "no_signal") for group in rolled
    ]
    path = file_path(out, "step", 0)
    write_file(path, make_table(0, decided, payloads, ()), FileFacts(step=0, complete=complete))
    return path
