"""The checks of `gpu_check.py` on learners."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import (
    Check,
    microbatches,
    random_groups,
)
from raygrpo.types import Group


def learner_config(path: Path, dtype: str) -> Any:
    from raygrpo.config.file import load_config

    return load_config(
        {
            "model": {"path": str(path), "dtype": dtype},
            "data": {"source": "reasoning_gym:chain_sum"},
            "sampling": {"num_completions": 3, "max_tokens": 20},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 4},
        }
    )


def learn(learner: Any, groups: Mapping[int, Group]) -> list[tuple[float, float]]:
    """Loss and gradient norm of four updates."""
    items, _ = microbatches(groups, learner.layout, budget=64)
    found = []
    for _ in range(4):
        stats = learner.update([items])
        found.append((stats["loss"].sum, stats["grad_norm"].sum))
    learner.close()
    return found


def learn_with_deepspeed(path: Path, dtype: str, device: str, threads: int, answer: Any) -> None:
    """In a process of its own: DeepSpeed belongs to one device."""
    import socket
    import sys

    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner

    torch.set_num_threads(threads)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learner = DeepSpeedLearner(learner_config(path, dtype), master_port=port, device=device)
    answer.send((learn(learner, random_groups(60)), "ray" in sys.modules))


def check_learner(options: argparse.Namespace, directory: Path) -> Iterator[Check]:
    """Updates on the device against the reference learner on the CPU."""
    from tests.parity.reference_learner import ReferenceLearner
    from tests.tiny import save_tiny_model

    path = save_tiny_model(directory / "learner", "qwen2")
    config = learner_config(path, "float32")
    expected = learn(ReferenceLearner(config), random_groups(60))
    found = learn(ReferenceLearner(config, device=options.device), random_groups(60))
    yield from compare_updates("reference learner", expected, found, 1e-3)
    if find_spec("deepspeed") is None:
        yield Check(name="DeepSpeed", value="not installed")
        return
    # bfloat16 rounds weights and activations by up to 2^-9 each.
    tolerances = {"float32": 1e-3} if options.quick else {"float32": 1e-3, "bfloat16": 1e-1}
    for dtype, tolerance in tolerances.items():
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=learn_with_deepspeed,
            args=(path, dtype, options.device, options.threads, theirs),
        )
        process.start()
        theirs.close()
        found, ray = ours.recv()
        process.join()
        yield from compare_updates(f"DeepSpeed {dtype}", expected, found, tolerance)
        yield Check.true(f"DeepSpeed {dtype}: without Ray", not ray)
    if options.device == "cuda" and not options.quick:
        for shape in ("0.5b", "1.5b"):
            yield from update_speed(shape, options, directory)


def compare_updates(
    name: str,
    expected: Sequence[tuple[float, float]],
    found: Sequence[tuple[float, float]],
    tolerance: float,
) -> Iterator[Check]:
    """Losses against the largest of them, norms each against its own."""
    scale = max(abs(loss) for loss, _ in expected)
    pairs = list(zip(expected, found, strict=True))
    losses = max(abs(a[0] - b[0]) / scale for a, b in pairs)
    norms = max(abs(a[1] - b[1]) / a[1] for a, b in pairs)
    yield Check.most(f"{name}: losses", losses, tolerance)
    yield Check.most(f"{name}: gradient norms", norms, tolerance)


def update_speed(shape: str, options: argparse.Namespace, directory: Path) -> Iterator[Check]:
    """Seconds, share of a matrix product and peak memory of our side of `update_vs_trl.py`."""
    from benchmarks import update_vs_trl
    from benchmarks.flops import matmul_flops, update_flops
    from benchmarks.shapes import save_shape

    model = str(save_shape(shape, directory / f"update-{shape}"))
    arguments = ["--sides", "raygrpo", "--device", options.device, "--pairs", "3"]
    given = update_vs_trl.parse_arguments([*arguments, "--threads", str(options.threads)])
    found = update_vs_trl.measure(given, update_vs_trl.make_spec(given, model, str(directory)))
    assert found.work is not None
    seconds = statistics.median(wall for wall, _ in found.taken["raygrpo"])
    plain = matmul_flops("bfloat16", options.device, options.threads)
    share = update_flops(model, found.work) / seconds / plain
    yield Check(name=f"update {shape}: seconds", value=f"{seconds:.3f}")
    yield Check(name=f"update {shape}: MFU, executed over a plain product", value=f"{share:.2f}")
    yield Check(name=f"update {shape}: peak GB", value=f"{found.peaks['raygrpo']:.1f}")
