"""What a start tells the user before the first step, as events: (kind, fields)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raygrpo.actors.cluster.placement import address_of
from raygrpo.config import RunConfig
from raygrpo.data.prompts import PromptStream
from raygrpo.data.sources import eval_section, split_of

Event = tuple[str, dict[str, Any]]

CPUINFO = Path("/proc/cpuinfo")
# Each flag stands for instructions that multiply bfloat16 numbers.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def start_events(
    config: RunConfig,
    *,
    refused: Sequence[str],
    changed: Sequence[str],
    revisions: Sequence[str],
    sources: Mapping[str, PromptStream],
) -> Iterator[Event]:
    """All events of a start, such as ``("config_changed", {"change": "seed: 1 -> 2"})``.

    Args:
        refused: why the start passed checkpoints over.
        changed: keys whose values differ from the previous start's.
        revisions: models and data sets whose revisions differ from the previous start's.
        sources: the sources of prompts by stream.
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
    """Why the learner should use another ``model.dtype`` on this machine's CPU.

    None if the dtype suits the CPU, if the learner runs elsewhere, or if the CPU is unknown.
    """
    if config.model.dtype != "bfloat16" or config.ray.gpus.learner or address_of(config) != "local":
        return None
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    # Each core of an x86 CPU has a line of flags; no other CPU has one.
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    if not flags or any(_BFLOAT16_FLAGS & each for each in flags):
        return None
    return "this CPU has no instructions for bfloat16: set model.dtype: float32"


def eval_problem(config: RunConfig) -> str | None:
    """Why evaluations say little about what the model learnt: they read the training rows.

    None if evaluations read other rows, or if the rows are unknown (a mixture, or a data set that
    was passed in Python).
    """
    data = config.data
    if not config.eval.eval_steps or data.mixture or data.source == "python":
        return None
    read = eval_section(data, config.eval, seed=config.seed)
    rows = [(d.source, {**d.params, "split": split_of(d)}) for d in (data, read)]
    if rows[0] != rows[1]:
        return None
    return f"evaluations read the rows of {data.source} that are trained on: set eval.data"
