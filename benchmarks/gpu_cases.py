"""What the checks of `gpu_check.py` share, and those of rows. Nothing here imports Ray."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.algorithm.packing import RowLayout, make_microbatch, place
from raygrpo.config import ModelSection
from raygrpo.types import Group, GroupRequest, Microbatch, PlannedSample, StepBatch, Version
from tests import builders

KINDS = ("llama", "qwen2", "gemma3")
LAYOUTS: tuple[RowLayout, ...] = ("plain", "shared", "packed")
# fp32 sums in another order, by other kernels: of 1e-7 each, over networks of some layers.
LOGPROB_GAP, GRADIENT_GAP = 1e-4, 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A line of the table; ``good`` is None where it is only reported."""

    name: str
    value: str
    bound: str = ""
    good: bool | None = None

    @classmethod
    def most(cls, name: str, value: float, bound: float) -> Check:
        """A value that must not exceed a bound (NaN does)."""
        return cls(name=name, value=f"{value:.2g}", bound=f"<= {bound:g}", good=value <= bound)

    @classmethod
    def true(cls, name: str, value: bool) -> Check:
        """Something that must be so."""
        return cls(name=name, value=str(value), bound="True", good=value)

    def line(self) -> str:
        """Of Markdown."""
        verdict = {None: "", True: "ok", False: "FAILED"}[self.good]
        return f"| {self.name} | {self.value} | {self.bound} | {verdict} |"


def relative_gap(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over the norm of the first."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / one.norm())


@dataclass(slots=True)
class Peak:
    """Bytes of a device beyond what was held at the beginning."""

    num_bytes: int = 0


@contextlib.contextmanager
def peak_of(device: str) -> Iterator[Peak]:
    """The peak of what happens inside; 0 on a CPU."""
    peak = Peak()
    if device == "cpu":
        yield peak
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield peak
    torch.cuda.synchronize()
    peak.num_bytes = torch.cuda.max_memory_allocated() - before


# --- groups and rows ----------------------------------------------------------------------------


def make_request(
    group_id: int, prompt: Sequence[int], count: int, new_tokens: int, *, exactly: bool = False
) -> GroupRequest:
    """A group of completions of at most, or exactly, so many tokens, from the first version on.

    Where no end may come, logprobs are of a distribution without it.
    """
    request = builders.request(
        group_id,
        num_completions=count,
        tokens=prompt,
        max_tokens=new_tokens,
        min_tokens=new_tokens if exactly else 0,
    )
    return replace(request, min_version=Version(0, 0))


def random_groups(vocabulary: int, seed: int = 0) -> dict[int, Group]:
    """Four groups of three completions, of random tokens and lengths."""
    random = np.random.default_rng(seed)
    groups = {}
    for group_id in range(4):
        prompt = random.integers(3, vocabulary, int(random.integers(2, 24))).tolist()
        completions = []
        for _ in range(3):
            size = int(random.integers(1, 20))
            tokens = random.integers(3, vocabulary, size).tolist()
            completions.append(builders.completion(tokens, random.normal(-3, 1, size).tolist()))
        groups[group_id] = builders.group(make_request(group_id, prompt, 3, 20), completions)
    return groups


def microbatches(
    groups: Mapping[int, Group], layout: RowLayout, budget: int = 256
) -> tuple[list[Microbatch], list[list[tuple[int, int]]]]:
    """Rows of all completions, and for each microbatch the (group, completion) of its sequences."""
    random = np.random.default_rng(1)
    total = sum(c.token_ids.size for group in groups.values() for c in group.completions)
    samples = [
        PlannedSample(
            group_id=group_id,
            completion_index=index,
            prompt_length=group.request.prompt.token_ids.size,
            completion_length=completion.token_ids.size,
            num_loss_tokens=completion.token_ids.size,
            advantage=float(random.normal()),
            loss_weight=1 / total,
        )
        for group_id, group in groups.items()
        for index, completion in enumerate(group.completions)
    ]
    batch = StepBatch(
        step=0, minibatches=(tuple(samples),), payloads=dict.fromkeys(groups), versions={}
    )
    ((plans,),) = place(batch, 1, tokens_per_microbatch=budget, layout=layout)
    names = [[(s.group_id, s.completion_index) for row in plan for s in row] for plan in plans]
    return [make_microbatch(plan, groups) for plan in plans], names


Scores = dict[tuple[int, int], Tensor]


def policy_scores(
    policy: Any, groups: Mapping[int, Group], layout: RowLayout, device: str
) -> tuple[Scores, Tensor | None]:
    """Logprobs of each completion, and the flat gradient of their sum by advantage and weight,
    where gradients are on."""
    from raygrpo.learner.inputs import policy_inputs

    policy._layout = layout
    policy.zero_grad()
    scores: Scores = {}
    for item, names in zip(*microbatches(groups, layout), strict=True):
        logprobs, _ = policy(policy_inputs(item, torch.device(device)))
        for number, name in enumerate(names):
            scores[name] = logprobs[torch.tensor(item.sequence_ids == number, device=device)]
        if torch.is_grad_enabled():
            losses = [
                -float(item.advantages[n] * item.loss_weights[n]) * scores[name].sum()
                for n, name in enumerate(names)
            ]
            torch.stack(losses).sum().backward()
    found = {name: values.detach().float().cpu() for name, values in scores.items()}
    if not torch.is_grad_enabled():
        return found, None
    gradients = [p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None]
    return found, torch.cat(gradients)


def largest_gap(one: Scores, other: Scores) -> float:
    """The largest difference of a logprob."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def load(path: Path, *, random_seed: int | None = None, dtype: str = "float32") -> Any:
    """A policy on the CPU; with a seed, of fresh weights."""
    from raygrpo.learner.loading import load_policy

    section = ModelSection(path=str(path), dtype=dtype, random_init=random_seed is not None)  # type: ignore[arg-type]
    return load_policy(section, seed=random_seed or 0, dtype=getattr(torch, dtype), temperature=1.0)


def check_rows(options: argparse.Namespace, directory: Path) -> Iterator[Check]:
    """Every layout on the device against padded rows on the CPU."""
    from tests.tiny import save_tiny_model

    for kind in KINDS:
        path = save_tiny_model(directory / kind, kind)  # type: ignore[arg-type]
        policy, groups = load(path), random_groups(60)
        yield Check.true(f"rows {kind}: can be packed", policy.layout == "packed")
        expected, wanted = policy_scores(policy, groups, "plain", "cpu")
        policy.to(options.device)
        for layout in LAYOUTS:
            scores, gradient = policy_scores(policy, groups, layout, options.device)
            assert wanted is not None and gradient is not None
            name = f"rows {kind}, {layout}"
            yield Check.most(f"{name}: logprobs", largest_gap(expected, scores), LOGPROB_GAP)
            yield Check.most(f"{name}: gradient", relative_gap(wanted, gradient), GRADIENT_GAP)
