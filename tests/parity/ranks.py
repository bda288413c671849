"""Processes of learner ranks, forked from one that has imported the heavy libraries."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

DEADLINE_S = 280
# What the ranks import, late imports included.
PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "peft",
    "torch._inductor.compile_fx",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "tests.parity.deepspeed_worker",
    "tests.parity.test_memory",
)


def run_ranks(
    work: Callable[..., object], num_ranks: int, directory: Path, *args: Any, exitcode: int = 0
) -> list[Any]:
    """``work(*args, rank, port)`` of each rank of a process group, one process a rank.

    All processes must end with ``exitcode``; those that are to die have no result.
    """
    directory.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    processes = [
        context.Process(target=_run, args=(work, directory, *args, rank, port))
        for rank in range(num_ranks)
    ]
    try:
        # DeepSpeed reads the first, and torch the second, when they are imported.
        with patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):
            for process in processes:
                process.start()
        deadline = time.monotonic() + DEADLINE_S
        for process in processes:
            process.join(max(1, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    logs = [path.read_text()[-3000:] for path in sorted(directory.glob("*.log"))]
    assert codes == [exitcode] * num_ranks, "\n".join(logs)
    results = sorted(directory.glob("*.pt"))
    return [torch.load(path, weights_only=False) for path in results]


def _run(work: Callable[..., object], directory: Path, *args: Any) -> None:
    rank = args[-2]
    log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.save(work(*args), directory / f"rank-{rank}.pt")
