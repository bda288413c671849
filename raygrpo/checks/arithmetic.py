"""The arithmetic of a step at full lengths: completions, updates, microbatches, tokens."""

from __future__ import annotations

from collections.abc import Sequence

from raygrpo.algorithm.packing import (
    MicrobatchPlan,
    RowLayout,
    place,
    row_length,
    trees_of,
    unpacked,
)
from raygrpo.checks.memory import FullUpdate
from raygrpo.config import RunConfig
from raygrpo.learner.schedule import learning_rate
from raygrpo.types import PlannedSample, StepBatch, Version

# Lines to print by their names, such as ``{"completions a step": "32 (4 groups of 8)"}``.
Lines = dict[str, str]
_START = Version(0, 0)


def batch_facts(
    config: RunConfig, update: FullUpdate, *, longest_prompt: int, num_prompts: int | None
) -> Lines:
    """The lines that describe a step; ``num_prompts`` is None for a stream."""
    train, sampling = config.train, config.sampling
    completions = train.groups_per_step * sampling.num_completions
    updates = train.num_iterations * train.num_minibatches
    total = updates * train.steps
    row = longest_prompt + sampling.max_tokens
    rates = [learning_rate(i, total, config.optimizer) for i in (0, total // 2, total - 1)]
    epochs = train.steps * train.groups_per_step / num_prompts if num_prompts else None
    return {
        "completions a step": f"{completions} ({train.groups_per_step} groups of "
        f"{sampling.num_completions})",
        "sequences an update": f"{completions // train.num_minibatches}",
        "updates": f"{total} ({train.steps} steps x {train.num_iterations} passes x "
        f"{train.num_minibatches} minibatches), {config.optimizer.warmup_updates} of warm-up",
        "learning rate": ", ".join(f"{rate:.3g}" for rate in rates) + " (first, middle, last)",
        "microbatches a rank": f"at most {update.microbatches} an update, of "
        f"{train.tokens_per_microbatch} tokens; the longest row has {update.longest}",
        "tokens a step": f"at most {completions * row} ({completions} x ({longest_prompt} + "
        f"{sampling.max_tokens}))",
        "epochs": "unknown" if epochs is None else f"{epochs:.2f}",
        "staleness": f"at most {train.max_staleness} versions",
    }


def fullest_step(
    config: RunConfig, longest_prompt: int, *, hidden_size: int, layout: RowLayout
) -> FullUpdate:
    """A rank's update at full lengths; ranks that share tokens do not use ``packed`` rows."""
    train = config.train
    batch = full_step(config, longest_prompt)
    used = unpacked(layout) if config.learner.sequence_parallel > 1 else layout
    plan = place(
        batch,
        config.learner.num_ranks // config.learner.sequence_parallel,
        tokens_per_microbatch=train.tokens_per_microbatch,
        layout=used,
        hidden_size=hidden_size,
    )[0][0]
    return _full_update(plan, used, train.tokens_per_microbatch)


def full_step(config: RunConfig, longest_prompt: int) -> StepBatch:
    """The plan of one minibatch: all prompts and completions have full length, and all teach."""
    length = config.sampling.max_tokens
    groups = range(config.train.groups_per_step // config.train.num_minibatches)
    samples = tuple(
        PlannedSample(
            group_id=group,
            completion_index=index,
            prompt_length=longest_prompt,
            completion_length=length,
            num_loss_tokens=length,
            advantage=1.0,
            loss_weight=1 / (len(groups) * config.sampling.num_completions * length),
        )
        for group in groups
        for index in range(config.sampling.num_completions)
    )
    return StepBatch(
        step=0,
        minibatches=(samples,),
        payloads=dict.fromkeys(groups),
        versions=dict.fromkeys(groups, (_START, _START)),
    )


def _full_update(
    plan: Sequence[MicrobatchPlan], layout: RowLayout, tokens_per_microbatch: int
) -> FullUpdate:
    lengths = [[row_length(row) for row in microbatch] for microbatch in plan]
    longest = max(map(max, lengths))
    masked = [
        len(rows) * max(rows) ** 2
        for rows, samples in zip(lengths, plan, strict=True)
        if any(len(row) > 1 for row in samples)
    ]
    copied = [
        sum(len(tree) * tree[0].prompt_length for tree in trees if len(tree) > 1)
        for trees in ([tree for row in rows for tree in trees_of(row)] for rows in plan)
    ]
    total = sum(len(rows) * max(rows) for rows in lengths)
    return FullUpdate(
        microbatches=len(plan),
        # Shorter samples fill a microbatch better than full ones, up to its budget.
        tokens=max(longest, min(total, tokens_per_microbatch)),
        longest=longest,
        copied=max(copied) if layout == "packed" else 0,
        mask=max(masked, default=0) if layout == "shared" else 0,
    )
