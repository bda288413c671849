"""From a plan to microbatches: rows, their assignment to ranks, and the arrays a rank computes.

A row holds completions of one group that share its prompt (``prompt, completion 1, completion 2,
...``, each completion's positions restarting after the prompt), or a single completion with its
prompt. Nothing is cut and nothing is dropped: ranks get equal numbers of microbatches by splitting,
and, where there is nothing left to split, by fillers that carry no weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raygrpo.types import Group, Microbatch, PlannedSample, Sample, StepBatch

Row = tuple[PlannedSample, ...]
MicrobatchPlan = tuple[Row, ...]


def place(
    batch: StepBatch,
    num_ranks: int,
    *,
    tokens_per_microbatch: int,
    shared_prompts: bool = True,
    attention_length: float = math.inf,
) -> list[list[list[MicrobatchPlan]]]:
    """Assigns a step's samples to ranks: ``[rank][minibatch][microbatch] -> rows``.

    Every rank gets the same number of microbatches in each minibatch. Deterministic.

    Args:
        tokens_per_microbatch: padded tokens of a microbatch; a single row may exceed it.
        shared_prompts: whether completions may share their prompt's computation in a row.
        attention_length: the row length at which attention costs as much as all the rest (about six
            times the hidden size).
    """
    ranks: list[list[list[MicrobatchPlan]]] = [[] for _ in range(num_ranks)]
    for samples in batch.minibatches:
        rows = _make_rows(samples, tokens_per_microbatch, shared_prompts, attention_length)
        shares = _balance(rows, num_ranks, attention_length)
        plans = [_split_rows(share, tokens_per_microbatch) for share in shares]
        plans = _equalise(plans, rows)
        for rank, plan in enumerate(plans):
            ranks[rank].append(plan)
    return ranks


def make_samples(group: Group, plans: Sequence[PlannedSample]) -> list[Sample]:
    """The planned samples of one group with their tokens."""
    prompt = group.request.prompt.token_ids
    samples = []
    for plan in plans:
        completion = group.completions[plan.completion_index]
        head = np.zeros(prompt.size, np.bool_)
        loss_mask = np.concatenate([head, completion.loss_mask & (not plan.filler)])
        samples.append(
            Sample(
                plan=plan,
                token_ids=np.concatenate([prompt, completion.token_ids]).astype(np.int32),
                loss_mask=loss_mask,
                sampler_logprobs=np.concatenate(
                    [np.zeros(prompt.size, np.float32), completion.logprobs]
                ).astype(np.float32),
            )
        )
    return samples


def make_microbatch(plan: MicrobatchPlan, groups: Mapping[int, Group]) -> Microbatch:
    """The arrays of a microbatch; ``groups`` holds at least the groups that it names."""
    length = max(_row_length(row) for row in plan)
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
        samples = make_samples(groups[row[0].group_id], row)
        _fill_row({name: array[index] for name, array in arrays.items()}, samples, len(planned))
        planned += row
    return Microbatch(
        **arrays,
        advantages=np.array([sample.advantage for sample in planned], np.float32),
        loss_weights=np.array(
            [0.0 if sample.filler else sample.loss_weight for sample in planned], np.float32
        ),
    )


def _fill_row(row: Mapping[str, Any], samples: Sequence[Sample], first_sequence: int) -> None:
    """Writes one row: a lone sample as one segment, several as a prompt with branches."""
    prompt_length = samples[0].plan.prompt_length
    start = 0
    for offset, sample in enumerate(samples):
        shares = offset > 0
        tokens = slice(prompt_length if shares else 0, sample.token_ids.size)
        count = tokens.stop - tokens.start
        here = slice(start, start + count)
        row["token_ids"][here] = sample.token_ids[tokens]
        row["positions"][here] = np.arange(tokens.start, tokens.stop)
        row["loss_mask"][here] = sample.loss_mask[tokens]
        row["sampler_logprobs"][here] = sample.sampler_logprobs[tokens]
        row["predictors"][here] = np.maximum(np.arange(start, start + count) - 1, 0)
        completion = slice(start + (0 if shares else prompt_length), start + count)
        row["sequence_ids"][completion] = first_sequence + offset
        row["segment_ids"][here] = 0
        if len(samples) > 1:
            row["segment_ids"][completion] = offset + 1
            row["parent_ids"][completion] = 0
        if completion.start < completion.stop:
            row["predictors"][completion.start] = prompt_length - 1
        start += count


def _row_length(row: Row) -> int:
    return row[0].prompt_length + sum(sample.completion_length for sample in row)


def _row_cost(row: Row, attention_length: float) -> float:
    length = _row_length(row)
    return length * (1 + length / attention_length)


def _make_rows(
    samples: Sequence[PlannedSample],
    tokens_per_microbatch: int,
    shared_prompts: bool,
    attention_length: float,
) -> list[Row]:
    groups: dict[int, list[PlannedSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    rows: list[Row] = []
    for members in groups.values():
        widths = [1]
        while shared_prompts and widths[-1] < len(members):
            widths.append(min(widths[-1] * 2, len(members)))
        choices = [[tuple(members[i : i + w]) for i in range(0, len(members), w)] for w in widths]
        fitting = [
            choice
            for choice, width in zip(choices, widths, strict=True)
            if width == 1 or max(map(_row_length, choice)) <= tokens_per_microbatch
        ]
        rows += min(fitting, key=lambda c: sum(_row_cost(row, attention_length) for row in c))
    return rows


def _balance(rows: list[Row], num_ranks: int, attention_length: float) -> list[list[Row]]:
    """Longest processing time first: the next costliest row goes to the least loaded rank."""
    shares: list[list[Row]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for row in sorted(rows, key=lambda row: (-_row_cost(row, attention_length), _order(row))):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += _row_cost(row, attention_length)
    return shares


def _split_rows(rows: list[Row], tokens_per_microbatch: int) -> list[MicrobatchPlan]:
    """Rows of like length together, each microbatch within the budget of padded tokens."""
    plans: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (_row_length(row), _order(row))):
        # Rows come in rising length, so the newest row sets the padded length.
        fits = plans and (len(plans[-1]) + 1) * _row_length(row) <= tokens_per_microbatch
        if fits:
            plans[-1].append(row)
        else:
            plans.append([row])
    return [tuple(plan) for plan in plans]


def _equalise(plans: list[list[MicrobatchPlan]], rows: list[Row]) -> list[list[MicrobatchPlan]]:
    target = max((len(plan) for plan in plans), default=0)
    if not rows:
        return plans
    smallest = min(rows, key=lambda row: (_row_length(row[:1]), _order(row)))
    filler: MicrobatchPlan = ((replace(smallest[0], filler=True, advantage=0.0),),)
    for plan in plans:
        while len(plan) < target:
            widest = max(range(len(plan)), key=lambda i: len(plan[i]), default=-1)
            if widest < 0 or len(plan[widest]) < 2:
                plan.append(filler)
                continue
            half = len(plan[widest]) // 2
            plan[widest : widest + 1] = [plan[widest][:half], plan[widest][half:]]
    return plans


def _order(row: Row) -> tuple[int, int]:
    return row[0].group_id, row[0].completion_index
