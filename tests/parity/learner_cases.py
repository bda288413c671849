"""Runs of the learner that several tests share: configurations, and steps of random completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raygrpo.algorithm.packing import RowLayout, make_microbatch, place
from raygrpo.algorithm.step_plan import make_step_batch
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.types import FinishedGroup, Group, GroupSummary, Microbatch
from tests.builders import completion, group, request, summary

VOCABULARY = 60
Minibatch = list[Microbatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One completion of a prompt."""

    tokens: np.ndarray
    sampler_logprobs: np.ndarray
    loss_mask: np.ndarray
    advantage: float
    loss_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A prompt and its completions."""

    prompt: np.ndarray
    branches: tuple[Branch, ...]


def make_config(directory: Path | str, /, **sections: Any) -> RunConfig:
    """A configuration with a short schedule, active clipping and a rate that moves the weights."""
    base: dict[str, Any] = {
        "model": {"path": str(directory)},
        "data": {"source": "reasoning_gym:chain_sum"},
        "sampling": {"temperature": 0.8, "max_tokens": 16},
        "loss": {"clip_low": 0.1, "clip_high": 0.15},
        "optimizer": {
            "lr": 2e-3,
            "schedule": "linear",
            "warmup_updates": 1,
            "adamw": {"weight_decay": 0.1},
            "max_grad_norm": 0.05,
        },
        "train": {"steps": 6},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return load_config(base)


def random_trees(seed: int, num_trees: int, num_branches: int = 3) -> list[Tree]:
    """Trees of random tokens, lengths, advantages and sampler logprobs; the weights add up to 1."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(num_trees):
        branches = []
        for _ in range(num_branches):
            length = int(rng.integers(1, 11))
            mask = rng.random(length) < 0.85
            mask[-1] = True
            branches.append(
                Branch(
                    tokens=rng.integers(3, VOCABULARY, length),
                    sampler_logprobs=rng.normal(-3, 1, length).astype(np.float32),
                    loss_mask=mask,
                    advantage=float(rng.normal()),
                    loss_weight=1 / (num_trees * num_branches * length),
                )
            )
        prompt = rng.integers(3, VOCABULARY, int(rng.integers(2, 13)))
        trees.append(Tree(prompt=prompt, branches=tuple(branches)))
    return trees


def separate(trees: Sequence[Tree]) -> list[Tree]:
    """One tree a completion: what plain rows are made of."""
    return [Tree(prompt=t.prompt, branches=(branch,)) for t in trees for branch in t.branches]


def microbatch(trees: Sequence[Tree]) -> Microbatch:
    """One row a tree; a tree of one branch becomes a plain row."""
    length = max(t.prompt.size + sum(b.tokens.size for b in t.branches) for t in trees)
    shape = (len(trees), length)
    arrays: dict[str, Any] = {
        name: np.full(shape, fill, np.int32)
        for name, fill in (
            ("token_ids", 0), ("positions", 0), ("segment_ids", -1), ("parent_ids", -1),
            ("predictors", 0), ("sequence_ids", -1),
        )
    }  # fmt: skip
    arrays["loss_mask"] = np.zeros(shape, np.bool_)
    arrays["sampler_logprobs"] = np.zeros(shape, np.float32)
    sequences: list[Branch] = []
    for row, tree in enumerate(trees):
        _write_row({name: array[row] for name, array in arrays.items()}, tree, len(sequences))
        sequences += tree.branches
    return Microbatch(
        **arrays,
        advantages=np.array([b.advantage for b in sequences], np.float32),
        loss_weights=np.array([b.loss_weight for b in sequences], np.float32),
    )


def _write_row(row: dict[str, Any], tree: Tree, first_sequence: int) -> None:
    size = tree.prompt.size
    row["token_ids"][:size] = tree.prompt
    row["positions"][:size] = np.arange(size)
    row["predictors"][:size] = np.maximum(np.arange(size) - 1, 0)
    row["segment_ids"][:size] = 0
    start = size
    for index, branch in enumerate(tree.branches):
        here = slice(start, start + branch.tokens.size)
        row["token_ids"][here] = branch.tokens
        row["positions"][here] = size + np.arange(branch.tokens.size)
        row["predictors"][here] = np.arange(start, here.stop) - 1
        row["predictors"][start] = size - 1
        row["segment_ids"][here] = 0 if len(tree.branches) == 1 else index + 1
        row["parent_ids"][here] = -1 if len(tree.branches) == 1 else 0
        row["loss_mask"][here] = branch.loss_mask
        row["sampler_logprobs"][here] = branch.sampler_logprobs
        row["sequence_ids"][here] = first_sequence + index
        start = here.stop


def filler() -> Microbatch:
    """A microbatch that trains nothing, as ranks with fewer rows get."""
    tree = random_trees(99, 1, 1)[0]
    branch = tree.branches[0]
    empty = Branch(
        tokens=branch.tokens,
        sampler_logprobs=branch.sampler_logprobs,
        loss_mask=np.zeros_like(branch.loss_mask),
        advantage=1.0,
        loss_weight=0.0,
    )
    return microbatch([Tree(prompt=tree.prompt, branches=(empty,))])


def make_steps(num_steps: int, num_minibatches: int, num_ranks: int) -> list[list[list[Minibatch]]]:
    """``[step][rank][minibatch]``: 1 to 3 microbatches a rank, of 1 to 3 rows, some of them trees.

    The microbatches of all ranks together are the same whatever ``num_ranks`` (1 or 2) is.
    """
    steps = []
    for step in range(num_steps):
        ranks: list[list[Minibatch]] = [[] for _ in range(num_ranks)]
        for index in range(num_minibatches):
            batches = _make_minibatch(seed=100 * step + index, num_microbatches=2 + 2 * (step % 3))
            for rank in range(num_ranks):
                ranks[rank].append(batches[rank::num_ranks])
        steps.append(ranks)
    return steps


def _make_minibatch(seed: int, num_microbatches: int) -> Minibatch:
    trees = random_trees(seed, 2 * num_microbatches)
    rng = np.random.default_rng(seed)
    batches = []
    for index in range(num_microbatches - 1):
        share = trees[index * 2 : index * 2 + int(rng.integers(1, 3))]
        batches.append(microbatch(share if index % 2 else separate(share)))
    return [*batches, filler()]


@dataclass(frozen=True, slots=True, kw_only=True)
class WideLogprobs:
    """Logprobs [N] of the trained tokens by a float32 head on a model's own hidden states."""

    model: Any
    logprobs: Any

    def gradients(self, batch: Microbatch) -> dict[str, Any]:
        """Of the sum of advantage x weight x logprob, by parameter."""
        sequences = batch.sequence_ids[batch.loss_mask]
        weights = (batch.advantages * batch.loss_weights)[sequences]
        (self.logprobs * self.logprobs.new_tensor(weights)).sum().backward()
        return {name: p.grad for name, p in self.model.named_parameters()}


def wide_logprobs(model: Any, batch: Microbatch, temperature: float) -> WideLogprobs:
    """Of plain rows, by autograd through a product in float32."""
    import torch

    ids = torch.tensor(batch.token_ids, dtype=torch.long)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    rows, columns = np.nonzero(batch.loss_mask)
    picked = hidden[rows, batch.predictors[rows, columns]].float()
    logits = picked @ model.get_output_embeddings().weight.float().T / temperature
    chosen = torch.log_softmax(logits, -1).gather(-1, ids[rows, columns][:, None])[:, 0]
    return WideLogprobs(model=model, logprobs=chosen)


def random_groups(seed: int, num_groups: int) -> list[tuple[Group, GroupSummary]]:
    """Groups of 2 to 5 completions as scored: some truncated, some without a score."""
    rng = np.random.default_rng(seed)
    made = []
    for group_id in range(num_groups):
        members, size = [], int(rng.integers(2, 6))
        for _ in range(size):
            length = int(rng.integers(1, 11))
            mask = rng.random(length) < 0.85
            mask[-1] = True
            tokens = rng.integers(3, VOCABULARY, length).tolist()
            sampled = rng.normal(-3, 1, length).tolist()
            finish = "length" if rng.random() < 0.2 else "stop"
            members.append(completion(tokens, sampled, mask.tolist(), finish))  # type: ignore[arg-type]
        prompt = rng.integers(3, VOCABULARY, int(rng.integers(2, 13))).tolist()
        rewards = [None if rng.random() < 0.15 else float(rng.normal()) for _ in members]
        done = summary(
            group_id,
            rewards,
            lengths=[member.token_ids.size for member in members],
            finishes=[member.finish for member in members],
            prompt_length=len(prompt),
        )
        counts = tuple(int(member.loss_mask.sum()) for member in members)
        order = request(group_id, num_completions=size, tokens=prompt)
        made.append((group(order, members), replace(done, num_loss_tokens=counts)))
    return made


def planned_step(
    config: RunConfig, seed: int, num_ranks: int, layout: RowLayout
) -> list[list[Minibatch]]:
    """``[rank][minibatch]`` of random groups, planned, placed and filled in as in a run."""
    made = random_groups(seed, config.train.groups_per_step)
    payloads = {done.group_id: payload for payload, done in made}
    finished = [FinishedGroup(summary=done, payload="", teaches=True) for _, done in made]
    batch = make_step_batch(seed, finished, config)
    placed = place(batch, num_ranks, tokens_per_microbatch=40, layout=layout)
    return [
        [[make_microbatch(plan, payloads) for plan in minibatch] for minibatch in rank]
        for rank in placed
    ]
