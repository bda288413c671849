"""One rank of a DeepSpeedLearner in a process of its own: runs a scenario, writes what it saw."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raygrpo.errors import RayGrpoError
from raygrpo.learner.deepspeed_learner import DeepSpeedLearner
from raygrpo.types import Microbatch
from tests.parity.learner_cases import make_config, make_steps


def main() -> None:
    """Arguments: a JSON file with the job, this rank, and the master's port."""
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, port = int(sys.argv[2]), int(sys.argv[3])
    results = {}
    learner = None
    for name, case in job["cases"].items():
        config = make_config(job["model"], **case["config"])
        learner = DeepSpeedLearner(config, rank=rank, local_rank=rank, master_port=port)
        results[name] = SCENARIOS[case["scenario"]](learner, case, rank)
    torch.save(results, Path(job["out"]) / f"rank-{rank}.pt")
    if learner is not None:
        learner.close()


def weights(learner: DeepSpeedLearner) -> dict[str, torch.Tensor]:
    return dict(learner.named_weights())


def train(learner: DeepSpeedLearner, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Trains the case's steps; reports statistics and weights, before and after."""
    num_minibatches = learner.config.train.num_minibatches
    steps = make_steps(case["steps"], num_minibatches, learner.config.learner.num_ranks)
    before = weights(learner)
    if rank == 0 and case.get("report_frozen_masters"):
        before = dict(before)
    history = [learner.update(step[rank]) for step in steps]
    report = {"before": before, "after": weights(learner), "masters": learner._masters()}
    report["history"] = [{k: (s.sum, s.count) for k, s in stats.items()} for stats in history]
    report["score"] = learner.score(steps[0][rank][0][0])
    return report


def not_finite(learner: DeepSpeedLearner, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """A step that is poisoned on the last rank only; what each rank raised, and its weights."""
    step = make_steps(2, 1, learner.config.learner.num_ranks)
    learner.update(step[0][rank])
    before = weights(learner)
    poisoned = step[1][rank]
    if rank == learner.config.learner.num_ranks - 1:
        poisoned = [[_poison(batch, case["value"]) for batch in poisoned[0]]]
    try:
        learner.update(poisoned)
        raised = ""
    except RayGrpoError as error:
        raised = f"{type(error).__name__}: {error}"
    return {"raised": raised, "before": before, "after": weights(learner)}


def _poison(batch: Microbatch, value: float) -> Microbatch:
    fields = {name: getattr(batch, name) for name in Microbatch.__dataclass_fields__}
    return Microbatch(**fields | {"advantages": np.full_like(batch.advantages, value)})


def save_and_die(learner: DeepSpeedLearner, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Trains, saves into a directory of this rank's own, trains on, and is killed at the end."""
    steps = make_steps(4, 1, learner.config.learner.num_ranks)
    for index, step in enumerate(steps):
        learner.update(step[rank])
        if index == 1:
            learner.save(Path(case["directory"]) / f"view-{rank}")
    torch.save(weights(learner), Path(case["directory"]) / f"uninterrupted-{rank}.pt")
    if case["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def resume(learner: DeepSpeedLearner, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Loads what `save_and_die` saved, after an update that must leave no trace, and goes on."""
    steps = make_steps(4, 1, learner.config.learner.num_ranks)
    if case["dirty"]:
        learner.update(steps[3][rank])
    learner.load(Path(case["directory"]) / f"view-{rank}")
    restored = learner.num_updates
    for step in steps[2:]:
        learner.update(step[rank])
    return {"num_updates": restored, "after": weights(learner)}


def refused_load(learner: DeepSpeedLearner, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Loading another layout's checkpoint: the error, and that nothing changed."""
    before = weights(learner)
    try:
        learner.load(case["directory"])
        raised = ""
    except RayGrpoError as error:
        raised = f"{type(error).__name__}: {error}"
    return {"raised": raised, "before": before, "after": weights(learner)}


SCENARIOS = {
    "train": train,
    "not_finite": not_finite,
    "save_and_die": save_and_die,
    "resume": resume,
    "refused_load": refused_load,
}

if __name__ == "__main__":
    main()
