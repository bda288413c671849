"""Rollouts that several trainers learn from, and how raygrpo learns from them.

Everything is drawn from numpy's frozen ``RandomState``, so that a recording made elsewhere
(`record_trl024.py`) stays valid. Run as a script, this writes what that recorder reads:
``python -m tests.parity.trl_cases DIRECTORY``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.algorithm.packing import MicrobatchPlan, make_microbatch, place
from raygrpo.algorithm.step_plan import make_step_batch
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.types import FinishedGroup, Group, Microbatch, Score, Stat, summarise
from tests.builders import completion, request
from tests.parity.reference_learner import ReferenceLearner
from tests.tiny import Kind, save_tiny_model, tiny_tokenizer

KINDS: tuple[Kind, ...] = ("llama", "gemma3")
# What every run of TRL's is told: fp32 (its default mixes in bf16), so that a difference is one of
# mathematics; on the CPU; and to keep its files to itself.
TRL_SETTINGS: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
NUM_STEPS, GROUPS_PER_STEP, GROUP_SIZE, MAX_TOKENS = 2, 3, 8, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One group: prompt [P], completions [G][C] with their loss masks, rewards [G]."""

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]
    rewards: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one optimizer update did; gradients are those before clipping, weights those after."""

    loss: float
    lr: float
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def grad_norm(self) -> float:
        return float(flat(self.gradient).norm())


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All elements as one vector, in the order of the names."""
    return torch.cat([tensors[name].detach().flatten().double() for name in sorted(tensors)])


def save_model(directory: Path, kind: Kind) -> Path:
    """A tiny model whose weights do not depend on torch's generator."""
    from safetensors.torch import load_file, save_file

    path = save_tiny_model(directory, kind)
    file = path / "model.safetensors"
    random = np.random.RandomState(KINDS.index(kind))
    weights = load_file(file)
    for name in sorted(weights):
        if weights[name].ndim > 1:
            drawn = random.standard_normal(tuple(weights[name].shape)) * 0.25
            weights[name] = torch.from_numpy(drawn).float()
    save_file(weights, file, metadata={"format": "pt"})
    return path


def make_rollouts(*, holes: bool = False, seed: int = 0) -> list[list[Rollout]]:
    """``[step][group]``: real-valued, binary, and (in the last group) equal rewards.

    Completions have 1 to `MAX_TOKENS` tokens; those that stopped end in the end-of-sequence token.
    With ``holes`` some tokens are masked, as tokens that the policy did not write.
    """
    random = np.random.RandomState(seed)
    eos, size = tiny_tokenizer().eos_token_id, len(tiny_tokenizer())
    steps = []
    for _ in range(NUM_STEPS):
        groups = []
        for index in range(GROUPS_PER_STEP):
            prompt = random.randint(3, size, random.randint(2, 10)).tolist()
            completions, masks = [], []
            for _ in range(GROUP_SIZE):
                tokens = random.randint(3, size, random.randint(1, MAX_TOKENS + 1)).tolist()
                if len(tokens) < MAX_TOKENS:
                    tokens[-1] = eos
                mask = [True] * len(tokens)
                if holes and len(tokens) > 3:
                    mask[1:3] = [False, False]
                completions.append(tokens)
                masks.append(mask)
            draws: tuple[Callable[[], Any], ...] = (
                lambda: random.standard_normal(GROUP_SIZE),
                lambda: random.randint(0, 2, GROUP_SIZE),
                lambda: np.full(GROUP_SIZE, 0.75),
            )
            rewards = [round(float(value), 3) for value in draws[index]()]
            groups.append(
                Rollout(prompt=prompt, completions=completions, masks=masks, rewards=rewards)
            )
        steps.append(groups)
    return steps


def make_noise(steps: Sequence[Sequence[Rollout]], scale: float) -> dict[tuple[int, int], Any]:
    """Noise [C] on the old logprobs of each (group id, completion index)."""
    random = np.random.RandomState(7)
    groups = [rollout for step in steps for rollout in step]
    return {
        (group_id, index): (random.standard_normal(len(tokens)) * scale).astype(np.float32)
        for group_id, rollout in enumerate(groups)
        for index, tokens in enumerate(rollout.completions)
    }


def trl024_config(path: Path, **sections: Any) -> RunConfig:
    """The recipe, with the size of the run and nothing else."""
    values: dict[str, Any] = {
        "recipe": "trl024",
        "model": {"path": str(path)},
        "data": {"source": "reasoning_gym:chain_sum"},
        "sampling": {"max_tokens": MAX_TOKENS},
        "train": {"steps": NUM_STEPS, "groups_per_step": GROUPS_PER_STEP},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return load_config(values)


def finished_groups(
    steps: Sequence[Sequence[Rollout]], step: int
) -> tuple[list[FinishedGroup], dict[int, Group]]:
    """One step's groups as the trainer holds them, and their payloads by group id."""
    finished, payloads = [], {}
    for offset, rollout in enumerate(steps[step]):
        group_id = step * GROUPS_PER_STEP + offset
        order = request(
            group_id, num_completions=GROUP_SIZE, tokens=rollout.prompt, max_tokens=MAX_TOKENS
        )
        done = tuple(
            completion(tokens, mask=mask, finish="length" if len(tokens) == MAX_TOKENS else "stop")
            for tokens, mask in zip(rollout.completions, rollout.masks, strict=True)
        )
        payloads[group_id] = Group(request=order, completions=done)
        scores = [Score(value=r, parts={"given": r}) for r in rollout.rewards]
        summary = summarise(payloads[group_id], scores)
        finished.append(FinishedGroup(summary=summary, payload=None, teaches=True))
    return finished, payloads


class RecordingLearner(ReferenceLearner):
    """Keeps what each update did; ``noise`` is added to the old logprobs where it is set."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.noise: list[Tensor] | None = None
        self.updates: list[Update] = []
        self.statistics: list[dict[str, Stat]] = []
        self._gradient: dict[str, Tensor] = {}

    def _apply(self, lr: float) -> float:
        named = self._policy.model.named_parameters()
        self._gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}
        return super()._apply(lr)

    def _update_once(self, batch: Any, caches: Any) -> tuple[dict[str, Stat], Any]:
        if self.noise is not None:
            with torch.no_grad():
                old = [self._forward(item.inputs)[0] for item in batch]
            noisy = [a + b for a, b in zip(old, self.noise, strict=True)]
            caches = [replace(c, old_logprobs=o) for c, o in zip(caches, noisy, strict=True)]
        stats, filled = super()._update_once(batch, caches)
        self.statistics.append(stats)
        self.updates.append(
            Update(
                loss=stats["loss"].mean,
                lr=stats["learning_rate"].mean,
                gradient=self._gradient,
                weights=dict(self.named_weights()),
            )
        )
        return stats, filled


def train(
    config: RunConfig,
    steps: Sequence[Sequence[Rollout]],
    noise: dict[tuple[int, int], Any] | None = None,
) -> tuple[list[list[float]], RecordingLearner]:
    """raygrpo's own path from finished groups to updates; returns advantages [step][sequence]."""
    learner = RecordingLearner(config)
    advantages = []
    for step in range(len(steps)):
        finished, payloads = finished_groups(steps, step)
        batch = make_step_batch(step, finished, config)
        advantages.append([s.advantage for samples in batch.minibatches for s in samples])
        ((plans,),) = place(
            batch,
            1,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
            layout=learner.layout,
            hidden_size=learner.hf_model.config.hidden_size,
        )
        microbatches = [make_microbatch(plan, payloads) for plan in plans]
        if noise is not None:
            pairs = zip(plans, microbatches, strict=True)
            learner.noise = [_noise_grid(plan, made, noise) for plan, made in pairs]
        learner.update([microbatches])
    return advantages, learner


def _noise_grid(
    plan: MicrobatchPlan, microbatch: Microbatch, noise: dict[tuple[int, int], Any]
) -> Tensor:
    grid = np.zeros(microbatch.token_ids.shape, np.float32)
    for number, sample in enumerate(sample for row in plan for sample in row):
        here = microbatch.sequence_ids == number
        grid[here] = noise[sample.group_id, sample.completion_index]
    return torch.from_numpy(grid)


def main(directory: Path) -> None:
    """Writes the models and the rollouts for the recorder."""
    for kind in KINDS:
        save_model(directory / kind, kind)
    steps = make_rollouts()
    noise = make_noise(steps, 0.3)
    listed = [[group, index, values.tolist()] for (group, index), values in noise.items()]
    rollouts = [[asdict(rollout) for rollout in step] for step in steps]
    (directory / "case.json").write_text(json.dumps({"steps": rollouts, "noise": listed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
