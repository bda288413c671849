"""Scenarios of one rank of a DeepSpeedLearner, and what it saw."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from raygrpo.algorithm import logprobs
from raygrpo.errors import RayGrpoError
from raygrpo.learner.deepspeed_learner import DeepSpeedLearner
from raygrpo.learner.policy import PolicyModel
from raygrpo.learner.watch import MovementWatch
from raygrpo.types import Microbatch
from tests.parity.learner_cases import (
    make_config,
    make_steps,
    microbatch,
    planned_step,
    random_trees,
    separate,
)


class Worker(DeepSpeedLearner):
    """The learner, with the parts that scenarios look at.

    ``frozen`` is a parameter whose gradient the watch sees, and the optimizer does not get.
    """

    frozen: torch.nn.Parameter | None = None

    def _start_watch(self) -> MovementWatch:
        watch = super()._start_watch()
        if self.frozen is not None:
            self.frozen.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
        return watch

    @property
    def policy(self) -> PolicyModel:
        return self._policy

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        """The fp32 master weights by name."""
        return {name: master.detach().clone() for name, master in self._master_weights()}


def run_cases(cases: dict[str, dict[str, Any]], rank: int, port: int) -> dict[str, Any]:
    """What this rank saw in each case; all cases share one process group."""
    results = {}
    for name, case in cases.items():
        config = make_config(case["model"], **case["config"])
        learner = Worker(config, rank=rank, local_rank=rank, master_port=port)
        results[name] = SCENARIOS[case["scenario"]](learner, case, rank)
    learner.close()
    return results


def weights(learner: Worker) -> dict[str, torch.Tensor]:
    return dict(learner.named_weights())


def train(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Trains the case's steps; reports statistics and weights, before and after."""
    num_minibatches = learner.config.train.num_minibatches
    share, num_shares = learner.data_share
    steps = make_steps(case["steps"], num_minibatches, num_shares)
    # Several chunks a microbatch, and not as many on every rank.
    head = learner.policy.logprob_head
    head.settings = replace(head.settings, chunk_tokens=5)
    passes: list[int] = []
    head.register_forward_hook(lambda *_: passes.append(1))
    before = weights(learner)
    with patch.object(logprobs, "logit_chunks", wraps=logprobs.logit_chunks) as products:
        history = [learner.update(step[share]) for step in steps]
    report = {"before": before, "after": weights(learner), "masters": learner.masters}
    # How often the head was passed, and how often its logits were formed for that.
    return {**report, "history": history, "head": (len(passes), products.call_count)}


def fp32_head(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Scores a microbatch of this rank's own, and trains it."""
    batch = microbatch(separate(random_trees(rank, 2)))
    return {"scores": learner.score(batch), "stats": learner.update([[batch]])}


def train_planned(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Trains steps that are planned and placed as in a run, in the rows that the model can pack."""
    share, num_shares = learner.data_share
    history = []
    for seed in range(case["steps"]):
        step = planned_step(learner.config, seed, num_shares, learner.layout)
        history.append(learner.update(step[share]))
    return {"after": weights(learner), "history": history, "layout": learner.layout}


def stuck(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Updates that leave one tensor as it is, or do not reach it, until the watch raises."""
    name = case["tensor"]
    module = learner.policy.model.get_submodule(name.removesuffix(".weight"))
    if case["how"] == "unreached":
        module.forward = lambda x: torch.nn.functional.linear(x, module.weight.detach())
    else:
        learner.frozen = module.weight
    step, reports = make_steps(1, 1, learner.config.learner.num_ranks)[0], []
    while len(reports) < 20 and not any(reports):
        reports.append(attempt(learner, lambda: learner.update(step[rank]))["raised"])
    return {"raised": reports[-1], "count": len(reports)}


def train_adapter(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Trains; the adapter before and after, merged weights, and scores with adapter and base."""
    steps = make_steps(case["steps"], 1, learner.config.learner.num_ranks)
    # The first forward pass before the first publication, as ZeRO-3 needs it, is a score.
    scores = [learner.score(steps[0][0][0][0])]
    before = dict(learner.adapter_weights())
    history = [learner.update(step[rank]) for step in steps]
    scores.append(learner.score(steps[0][0][0][0]))
    after = dict(learner.adapter_weights())
    return {
        "before": before,
        "after": after,
        "merged": weights(learner),
        "history": history,
        "scores": scores,
    }


def nan_loss(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Updates whose advantages are NaN on the last rank only."""

    def poison(batch: list[list[Microbatch]]) -> list[list[Microbatch]]:
        if rank < learner.config.learner.num_ranks - 1:
            return batch
        return [[_with_advantages(item, float("nan")) for item in batch[0]]]

    return skipping(learner, rank, lambda batch: learner.update(poison(batch)))


def infinite_gradient(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Updates whose loss is finite, but whose gradient is not, on the last rank only."""

    def update(batch: list[list[Microbatch]]) -> dict[str, Any]:
        hooks = []
        if rank == learner.config.learner.num_ranks - 1:
            hooks.append(learner.policy.register_forward_hook(_spoil_gradient))
        try:
            return learner.update(batch)
        finally:
            for hook in hooks:
                hook.remove()

    return skipping(learner, rank, update)


def skipping(
    learner: Worker, rank: int, bad_update: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """One bad update between two good ones, then bad ones until the learner gives up."""
    first, second, third = make_steps(3, 1, learner.config.learner.num_ranks)
    learner.update(first[rank])
    before = weights(learner)
    stats = bad_update(second[rank])
    skipped = weights(learner)
    learner.update(third[rank])
    after, count, raised = weights(learner), 0, ""
    while not raised and count < 10:
        raised = attempt(learner, lambda: bad_update(second[rank]))["raised"]
        count += 1
    report = {"before": before, "skipped": skipped, "stats": stats, "after": after}
    return {**report, "raised": raised, "count": count, "end": weights(learner)}


def attempt(learner: Worker, action: Callable[[], object]) -> dict[str, Any]:
    """What the action raised, and the weights before and after it."""
    before = weights(learner)
    try:
        action()
        raised = ""
    except RayGrpoError as error:
        raised = f"{type(error).__name__}: {error}"
    return {"raised": raised, "before": before, "after": weights(learner)}


def _with_advantages(batch: Microbatch, value: float) -> Microbatch:
    return replace(batch, advantages=np.full_like(batch.advantages, value))


def _spoil_gradient(module: Any, inputs: Any, output: tuple[Any, Any]) -> None:
    if output[0].requires_grad:
        output[0].register_hook(lambda gradient: gradient * float("inf"))


def save_and_die(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Trains, saves into a directory of this rank's own, trains on, and is killed at the end."""
    steps = make_steps(4, 1, learner.config.learner.num_ranks)
    torch.manual_seed(1000 + rank)
    for index, step in enumerate(steps):
        learner.update(step[rank])
        if index == 1:
            learner.save(Path(case["directory"]) / f"view-{rank}")
    report = {"weights": weights(learner), "random": torch.rand(3)}
    torch.save(report, Path(case["directory"]) / f"uninterrupted-{rank}.pt")
    if case["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def resume(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Loads what `save_and_die` saved, after an update that must leave no trace, and goes on."""
    steps = make_steps(4, 1, learner.config.learner.num_ranks)
    if case["dirty"]:
        learner.update(steps[3][rank])
    learner.load(Path(case["directory"]) / f"view-{rank}")
    restored = learner.num_updates
    for step in steps[2:]:
        learner.update(step[rank])
    return {"num_updates": restored, "after": weights(learner), "random": torch.rand(3)}


def refused_load(learner: Worker, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Loading another layout's checkpoint: the error, and that nothing changed."""
    return attempt(learner, lambda: learner.load(case["directory"]))


SCENARIOS = {
    "train": train,
    "train_planned": train_planned,
    "stuck": stuck,
    "train_adapter": train_adapter,
    "fp32_head": fp32_head,
    "nan_loss": nan_loss,
    "infinite_gradient": infinite_gradient,
    "save_and_die": save_and_die,
    "resume": resume,
    "refused_load": refused_load,
}
