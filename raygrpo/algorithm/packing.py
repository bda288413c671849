"""From a plan to microbatches: rows, their assignment to ranks, and the arrays a rank computes.

A row holds one or more trees. A tree is a prompt and completions of its group (``prompt, completion
1, completion 2, ...``); each completion's positions go on from the prompt. The model's `RowLayout`
bounds a row. Nothing is cut and nothing is dropped: ranks get equal numbers of microbatches by
splitting, and, where there is nothing left to split, by fillers without weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from raygrpo.types import Group, Microbatch, PlannedSample, StepBatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# The content of a row. ``plain``: one completion; ``shared``: one tree, under a mask over its row;
# ``packed``: any number of trees, with attention by segment; a microbatch is then one row, without
# padding.
RowLayout = Literal["plain", "shared", "packed"]
Array = npt.NDArray[Any]
# Consecutive samples of one group form one tree.
Row = tuple[PlannedSample, ...]
MicrobatchPlan = tuple[Row, ...]
# Attention costs as much as all other work in a row of this many times the hidden size.
_ATTENTION_LENGTH = 6.0
# A split tree computes its prompt again: it must lower the cost of the most loaded rank by this.
_WORTH_SPLITTING = 0.99
_MAX_SWAPS = 200


def place(
    batch: StepBatch,
    num_ranks: int,
    *,
    tokens_per_microbatch: int,
    layout: RowLayout = "shared",
    hidden_size: float = math.inf,
) -> list[list[list[MicrobatchPlan]]]:
    """Assigns a step's samples to ranks: ``[rank][minibatch][microbatch] -> rows``.

    Every rank gets the same number of microbatches in each minibatch. Deterministic.

    Args:
        tokens_per_microbatch: padded tokens of a microbatch; a single tree may have more.
        hidden_size: of the model, which tells the cost of attention; infinite: attention is free.
    """
    cost = _Cost(layout, _ATTENTION_LENGTH * hidden_size)
    ranks: list[list[list[MicrobatchPlan]]] = [[] for _ in range(num_ranks)]
    for samples in batch.minibatches:
        trees = _make_trees(samples, tokens_per_microbatch, layout, cost)
        shares = _balance(trees, num_ranks, cost)
        if layout == "packed":
            plans = [_pack(share, tokens_per_microbatch) for share in shares]
        else:
            plans = [_split_rows(share, tokens_per_microbatch) for share in shares]
        for rank, plan in enumerate(_equalise(plans, samples)):
            ranks[rank].append(plan)
    return ranks


def unpacked(layout: RowLayout) -> RowLayout:
    """The layout for ranks that share a row's tokens: they attend under a mask over the row."""
    return "shared" if layout == "packed" else layout


def trees_of(row: Row) -> list[Row]:
    """The trees of a row, in order."""
    return [tuple(members) for _, members in groupby(row, key=lambda sample: sample.group_id)]


def row_length(row: Row) -> int:
    """The tokens of a row: of each tree the prompt, once, and its completions."""
    return sum(
        tree[0].prompt_length + sum(sample.completion_length for sample in tree)
        for tree in trees_of(row)
    )


def attention_pairs(tree: Row) -> int:
    """Pairs of a query and a key in a tree whose attention is computed segment by segment."""
    prompt = tree[0].prompt_length
    lengths = [sample.completion_length for sample in tree]
    return prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in lengths)


@dataclass(frozen=True, slots=True)
class _Cost:
    """The cost of a tree, in tokens without attention."""

    layout: RowLayout
    attention_length: float

    def __call__(self, tree: Row) -> float:
        length = row_length(tree)
        # Under a mask over the row, a row pays for the square of its length.
        pairs = attention_pairs(tree) if self.layout == "packed" else length * length
        return length + pairs / self.attention_length


def make_microbatch(plan: MicrobatchPlan, groups: Mapping[int, Group]) -> Microbatch:
    """The arrays of a microbatch; ``groups`` has at least the groups of the plan.

    Raises:
        ValueError: a group's lengths are not those of the plan.
    """
    length = max(row_length(row) for row in plan)
    shape = (len(plan), length)
    arrays: dict[str, Any] = {
        "token_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.full(shape, -1, np.int32),
        "parent_ids": np.full(shape, -1, np.int32),
        "predictors": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.bool_),
        "sampler_logprobs": np.zeros(shape, np.float32),
        "sequence_ids": np.full(shape, -1, np.int32),
    }
    planned: list[PlannedSample] = []
    for index, row in enumerate(plan):
        column = segment = 0
        for tree in trees_of(row):
            here = {name: array[index, column:] for name, array in arrays.items()}
            _fill_tree(here, groups[tree[0].group_id], tree, len(planned), segment, column)
            planned += tree
            column += row_length(tree)
            segment += 1 + len(tree)
    return Microbatch(
        **arrays,
        advantages=np.array([sample.advantage for sample in planned], np.float32),
        loss_weights=np.array(
            [0.0 if sample.filler else sample.loss_weight for sample in planned], np.float32
        ),
    )


def _fill_tree(
    row: Mapping[str, Any], group: Group, tree: Row, sequence: int, segment: int, column: int
) -> None:
    """Writes one tree: a lone completion in its prompt's segment, several as its branches.

    Args:
        row: views of the row's arrays that begin at its ``column``.
        sequence: the number of the first completion in its microbatch.
        segment: the number of the first segment in its row.
    """
    prompt = group.request.prompt.token_ids
    start = prompt.size
    row["token_ids"][:start] = prompt
    row["positions"][:start] = np.arange(start)
    row["predictors"][:start] = np.maximum(column + np.arange(start) - 1, 0)
    row["segment_ids"][:start] = segment
    for index, plan in enumerate(tree):
        completion = group.completions[plan.completion_index]
        size = completion.token_ids.size
        if (prompt.size, size) != (plan.prompt_length, plan.completion_length):
            raise ValueError(f"{plan} has {prompt.size} and {size} tokens")
        here = slice(start, start + size)
        row["token_ids"][here] = completion.token_ids
        row["positions"][here] = prompt.size + np.arange(size)
        row["loss_mask"][here] = completion.loss_mask & (not plan.filler)
        row["sampler_logprobs"][here] = completion.logprobs
        row["predictors"][here] = column + np.arange(start, start + size) - 1
        row["predictors"][start : start + min(size, 1)] = column + prompt.size - 1
        row["sequence_ids"][here] = sequence + index
        row["segment_ids"][here] = segment
        if len(tree) > 1:
            row["segment_ids"][here] = segment + index + 1
            row["parent_ids"][here] = segment
        start += size


def _make_trees(
    samples: Sequence[PlannedSample], tokens_per_microbatch: int, layout: RowLayout, cost: _Cost
) -> list[Row]:
    """Each group as trees of like size; their number is the cheapest one within the budget."""
    groups: dict[int, list[PlannedSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    trees: list[Row] = []
    for members in groups.values():
        widths = [1]
        while layout != "plain" and widths[-1] < len(members):
            widths.append(min(widths[-1] * 2, len(members)))
        choices = [[tuple(members[i : i + w]) for i in range(0, len(members), w)] for w in widths]
        fitting = [
            choice
            for choice, width in zip(choices, widths, strict=True)
            if width == 1 or max(map(row_length, choice)) <= tokens_per_microbatch
        ]
        trees += min(fitting, key=lambda choice: sum(map(cost, choice)))
    return trees


def _balance(trees: list[Row], num_ranks: int, cost: _Cost) -> list[list[Row]]:
    """Assigns trees to ranks, cut into halves and quarters where this evens out the loads."""
    owners, peak = _assign(trees, num_ranks, cost)
    parts, limit = trees, sum(map(cost, trees)) / num_ranks
    even = limit / _WORTH_SPLITTING
    while peak > even and any(len(part) > 1 for part in parts):
        parts = [piece for part in parts for piece in _cut(part, limit, cost)]
        limit /= 2
        new_owners, new_peak = _assign(parts, num_ranks, cost)
        if new_peak < _WORTH_SPLITTING * peak:
            trees, owners, peak = parts, new_owners, new_peak
    shares: list[list[Row]] = [[] for _ in range(num_ranks)]
    for tree, owner in zip(trees, owners, strict=True):
        shares[owner].append(tree)
    return shares


def _cut(tree: Row, limit: float, cost: _Cost) -> list[Row]:
    """A tree as parts that each cost at most ``limit``, or have one completion."""
    if len(tree) < 2 or cost(tree) <= limit:
        return [tree]
    half = len(tree) // 2
    return _cut(tree[:half], limit, cost) + _cut(tree[half:], limit, cost)


def _assign(trees: list[Row], num_ranks: int, cost: _Cost) -> tuple[list[int], float]:
    """The rank of each tree, and the highest cost of a rank.

    A rank's load is the larger of its shares of cost and of attention. The longest trees go first,
    each to the rank whose load stays lowest. Then the rank with the highest load swaps trees while
    a swap lowers its load.
    """
    if not trees:
        return [], 0.0
    weights = np.array([(cost(tree), attention_pairs(tree)) for tree in trees], np.float64)
    mean_cost = weights[:, 0].sum() / num_ranks
    weights *= num_ranks / weights.sum(0)
    loads = np.zeros((num_ranks, 2))
    owners = np.zeros(len(trees), np.int64)
    for index in sorted(range(len(trees)), key=lambda i: (-weights[i].max(), _order(trees[i]))):
        owners[index] = (loads + weights[index]).max(1).argmin()
        loads[owners[index]] += weights[index]
    for _ in range(_MAX_SWAPS):
        if loads.max() * _WORTH_SPLITTING < 1 or not _swap(weights, owners, loads):
            break
    return owners.tolist(), float(loads[:, 0].max() * mean_cost)


def _swap(
    weights: Float[Array, "trees 2"],
    owners: Int[Array, "trees"],
    loads: Float[Array, "ranks 2"],
) -> bool:
    """Moves a tree of the most loaded rank away, for another tree or none, if both ranks gain."""
    highest = loads.max(1).argmax()
    mine, others = np.flatnonzero(owners == highest), np.flatnonzero(owners != highest)
    if not others.size:
        return False
    # In the last columns the other rank gives no tree back.
    ranks = np.concatenate([owners[others], np.delete(np.arange(len(loads)), highest)])
    back = np.concatenate([weights[others], np.zeros((len(loads) - 1, 2))])
    given = weights[mine][:, None] - back
    peaks = np.maximum((loads[highest] - given).max(2), (loads[ranks] + given).max(2))
    tree, partner = np.unravel_index(peaks.argmin(), peaks.shape)
    if peaks[tree, partner] >= loads[highest].max() - 1e-9:
        return False
    owners[mine[tree]] = ranks[partner]
    if partner < others.size:
        owners[others[partner]] = highest
    loads[ranks[partner]] += given[tree, partner]
    loads[highest] -= given[tree, partner]
    return True


def _pack(trees: list[Row], tokens_per_microbatch: int) -> list[MicrobatchPlan]:
    """One row per microbatch: first fit, long trees first."""
    rows: list[list[Row]] = []
    free: list[int] = []
    for tree in sorted(trees, key=lambda tree: (-row_length(tree), _order(tree))):
        length = row_length(tree)
        index = next((i for i, room in enumerate(free) if length <= room), None)
        if index is None:
            index = len(rows)
            rows.append([])
            free.append(tokens_per_microbatch)
        rows[index].append(tree)
        free[index] -= length
    # In order of groups, so that two trees of one group in a row become one.
    return [(sum(sorted(row, key=_order), ()),) for row in rows]


def _split_rows(rows: list[Row], tokens_per_microbatch: int) -> list[MicrobatchPlan]:
    """Rows of like length together; each microbatch within the budget of padded tokens."""
    plans: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (row_length(row), _order(row))):
        # Rows come in rising length, so the newest row sets the padded length.
        fits = plans and (len(plans[-1]) + 1) * row_length(row) <= tokens_per_microbatch
        if fits:
            plans[-1].append(row)
        else:
            plans.append([row])
    return [tuple(plan) for plan in plans]


def _equalise(
    plans: list[list[MicrobatchPlan]], samples: Sequence[PlannedSample]
) -> list[list[MicrobatchPlan]]:
    """Equal numbers of microbatches on all ranks, by splitting and by fillers."""
    target = max((len(plan) for plan in plans), default=0)
    if not samples:
        return plans
    shortest = min(samples, key=lambda s: (s.prompt_length + s.completion_length, _order((s,))))
    filler: MicrobatchPlan = ((replace(shortest, filler=True, advantage=0.0),),)
    for plan in plans:
        while len(plan) < target:
            largest = max(range(len(plan)), key=lambda i: _num_samples(plan[i]), default=-1)
            if largest < 0 or _num_samples(plan[largest]) < 2:
                plan.append(filler)
            else:
                plan[largest : largest + 1] = _halves(plan[largest])
    return plans


def _halves(plan: MicrobatchPlan) -> list[MicrobatchPlan]:
    """A microbatch in two: by rows, else by trees, else by the completions of a tree."""
    if len(plan) > 1:
        return [plan[: len(plan) // 2], plan[len(plan) // 2 :]]
    (row,) = plan
    trees = trees_of(row)
    if len(trees) > 1:
        half = len(trees) // 2
        return [(sum(trees[:half], ()),), (sum(trees[half:], ()),)]
    half = len(row) // 2
    return [(row[:half],), (row[half:],)]


def _num_samples(plan: MicrobatchPlan) -> int:
    return sum(map(len, plan))


def _order(row: Row) -> tuple[int, int]:
    return row[0].group_id, row[0].completion_index
