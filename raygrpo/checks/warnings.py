"""What a start has to say before its first step, as events: (kind, fields)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raygrpo.config import RunConfig

Event = tuple[str, dict[str, Any]]

# Processors without units for bfloat16 multiply it 5 to 20 times as slowly as float32.
_SLOW = 2.0
_SIZE = 384
_ROUNDS = 3


def start_events(
    config: RunConfig,
    *,
    refused: Sequence[str],
    changed: Sequence[str],
    revisions: Sequence[str],
    sources: Mapping[str, Any],
) -> Iterator[Event]:
    """All of them.

    Args:
        refused: what is wrong with checkpoints that were passed over.
        changed: keys whose values are not those of the start before.
        revisions: models and data sets that are not those of the start before.
        sources: the prompts by stream.
    """
    for problem in refused:
        yield "checkpoint_refused", {"reason": problem}
    for change in changed:
        yield "config_changed", {"change": change}
    for change in revisions:
        yield "revision_changed", {"change": change}
    for stream, source in sources.items():
        counts = {"dropped": source.num_dropped, "truncated": source.num_truncated}
        if any(counts.values()):
            yield "long_prompts", {"stream": stream, **counts}
    if slow := dtype_problem(config):
        yield "slow_dtype", {"reason": slow}
    if same := eval_problem(config):
        yield "eval_on_training_rows", {"reason": same}


def dtype_problem(config: RunConfig) -> str | None:
    """Why ``model.dtype`` should be another one on this machine's CPU; None where it is fine, or
    where the learner is not on it."""
    from raygrpo.actors.cluster.placement import address_of

    if config.model.dtype != "bfloat16" or config.ray.gpus.learner or address_of(config) != "local":
        return None
    ratio = bfloat16_cost()
    if ratio < _SLOW:
        return None
    return f"bfloat16 takes {ratio:.0f} times as long as float32 here: set model.dtype: float32"


def eval_problem(config: RunConfig) -> str | None:
    """Why evaluations say little of what was learnt; None where they read rows of their own, or
    where that is not known (a mixture, a data set given in Python)."""
    from raygrpo.data.sources import eval_section, split_of

    data = config.data
    if not config.eval.eval_steps or data.mixture or data.source == "python":
        return None
    read = eval_section(data, config.eval, seed=config.seed)
    where = [(d.source, {**d.params, "split": split_of(d)}) for d in (data, read)]
    if where[0] != where[1]:
        return None
    return f"evaluations read the rows of {data.source} that are trained on: set eval.data"


def bfloat16_cost() -> float:
    """How many times as long as a float32 one a bfloat16 matrix product takes on this CPU."""
    import torch

    wide = torch.ones(_SIZE, _SIZE)
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(_ROUNDS):
        for dtype in best:
            matrix = wide.to(dtype)
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.bfloat16] / best[torch.float32]
