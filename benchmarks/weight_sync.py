"""Weight sync, from the learner's tensors to weights in use, against one memory copy of the bytes.

    python benchmarks/weight_sync.py [--layers 20] [--generators 1 4] [--runs 5]

Everything is real: a process that publishes as the learner does (tensors copied out, buckets,
checksums, the weight store), and generator actors that pull, build, pack, swap and prove it by the
probe. The model is randomly initialised, of SmolLM2-135M's widths. A full snapshot changes every
weight; a delta changes 1 % of them. ``copies`` is the total in memory copies, ``unproved`` that
without the two forward passes of the probe. ``stall`` is what decoding loses of a load while
generation goes on; the two publishes before the first run are not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import ray

from benchmarks.rollout_throughput import save_smollm2_shape
from raygrpo.actors.connect import connect, disconnect
from raygrpo.actors.generator import GeneratorActor
from raygrpo.actors.placement import demand_of
from raygrpo.actors.publishing import Publisher, PublishReport
from raygrpo.actors.spawn import spawn
from raygrpo.actors.weight_store import end_store, start_store
from raygrpo.config import ModelSection, RunConfig
from raygrpo.config_file import load_config
from raygrpo.models import DTYPES, load_model
from raygrpo.types import GroupRequest, Probe, Prompt, Sampling, Version
from raygrpo.weights.probe import probe_tokens

TIMEOUT_S = 300.0


class Source:
    """Publishes a model's weights as a learner's rank 0 does, without the learner's memory."""

    def __init__(self, model: ModelSection, store: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = load_model(model, seed=0, dtype=DTYPES[model.dtype]).requires_grad_(False)
        self._publisher = Publisher(store, local=True, timeout_s=TIMEOUT_S)

    def change(self, share: float) -> None:
        """Changes the bits of this share of all weights, at random places, by one unit."""
        for parameter in self._model.parameters():
            kind = torch.int32 if parameter.element_size() == 4 else torch.int16
            bits = parameter.view(-1).view(kind)
            count = round(share * bits.numel())
            chosen = torch.randperm(bits.numel())[:count] if share < 1 else slice(None)
            bits[chosen] ^= 1

    def publish(self, version: Version) -> tuple[float, PublishReport]:
        """Publishes; the seconds of the probe's forward pass, which is a part, and the report."""
        started = time.perf_counter()
        probe = self._score()
        probe_s = time.perf_counter() - started
        tensors = ((name, p.detach()) for name, p in self._model.named_parameters())
        return probe_s, self._publisher.publish(version, tensors, probe=probe)

    def _score(self) -> Probe:
        tokens = probe_tokens(self._model.config.vocab_size, 0)
        ids = torch.tensor([tokens])
        logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        return Probe(token_ids=tokens, logprobs=(0.0, *chosen.tolist()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=20, help="20: 0.40 GB in float32")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def memory_copy_s(num_bytes: int, runs: int) -> float:
    """Median seconds of one copy between two arrays that have been touched."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def make_config(directory: Path, arguments: argparse.Namespace) -> RunConfig:
    """A run's configuration over a model directory without weights."""
    import json

    import yaml

    model = save_smollm2_shape(directory / "model")
    shape = json.loads((model / "config.json").read_text())
    shape["num_hidden_layers"] = arguments.layers
    (model / "config.json").write_text(json.dumps(shape))
    (directory / "rows.jsonl").write_text('{"prompt": "1"}\n')
    path = directory / "run.yaml"
    written = {
        "run_dir": str(directory / "run"),
        "model": {"path": str(model), "random_init": True, "dtype": arguments.dtype},
        "data": {"source": str(directory / "rows.jsonl")},
        "rewards": [],
        "train": {"steps": 1, "max_staleness": 1},
        "ray": {"address": "local"},
    }
    path.write_text(yaml.safe_dump(written))
    return load_config(path)


class Rig:
    """One source, one store, and generators that keep generating while asked to."""

    def __init__(self, config: RunConfig, count: int) -> None:
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // count)
        self.store = start_store()
        self.source = spawn(Source, config.model, self.store, cores, num_cpus=0)
        options = {"num_cpus": 0, "max_concurrency": 1000}
        self.generators = [
            spawn(GeneratorActor, config, self.store, threads, **options) for _ in range(count)
        ]
        ray.get([g.start.remote(None) for g in self.generators], timeout=TIMEOUT_S)
        self.step = -1

    def sync(self, share: float) -> dict[str, float]:
        """One publish and all loads: seconds and bytes."""
        self.step += 1
        ray.get(self.source.change.remote(share), timeout=TIMEOUT_S)
        started = time.perf_counter()
        probe_s, report = ray.get(
            self.source.publish.remote(Version(1, self.step)), timeout=TIMEOUT_S
        )
        published = time.perf_counter()
        loads = ray.get([g.load.remote() for g in self.generators], timeout=TIMEOUT_S)
        ended = time.perf_counter()
        return {
            "total": ended - started,
            "publish": published - started,
            "probe": probe_s,
            "load": ended - published,
            "load_s": max(load.load_s for load in loads),
            "proof": probe_s + max(load.probe_s for load in loads),
            "stall_s": max(load.stall_s for load in loads),
            "num_bytes": float(report.num_bytes),
            "full_bytes": float(report.full_bytes),
        }

    def generate(self) -> list[Any]:
        """Starts a long group on every generator."""
        request = GroupRequest(
            stream="train",
            group_id=self.step,
            attempt=0,
            prompt=Prompt(id="p", token_ids=np.arange(1, 65, dtype=np.int32), text="?"),
            seed=0,
            sampling=Sampling(num_completions=16, max_tokens=400, min_tokens=400),
            min_version=Version(1, self.step),
        )
        return [g.generate.options(num_returns=2).remote(request)[0] for g in self.generators]

    def close(self) -> None:
        """Ends all actors."""
        for actor in (self.source, *self.generators):
            ray.kill(actor)
        end_store(self.store)


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def print_row(name: str, row: dict[str, float], copy_s: float) -> None:
    print(
        f"| {name} | {row['num_bytes'] / 1e6:.1f} | {row['publish']:.2f} | {row['load']:.2f} | "
        f"{row['total']:.2f} | {row['total'] / copy_s:.1f} | "
        f"{(row['total'] - row['proof']) / copy_s:.1f} | {row['stall_s'] * 1e3:.0f} | "
        f"{row['stall_s'] / row['load_s']:.3f} |",
        flush=True,
    )


def measure(config: RunConfig, count: int, runs: int) -> None:
    rig = Rig(config, count)
    rig.sync(1)
    warm = rig.sync(1)
    rig.sync(1)
    copies, full = [], []
    for _ in range(runs):
        copies.append(memory_copy_s(int(warm["full_bytes"]), 3))
        full.append(rig.sync(1))
    copy_s = statistics.median(copies)
    print(f"| one copy | {warm['full_bytes'] / 1e6:.1f} | | | {copy_s:.3f} | 1.0 | 1.0 | | |")
    print_row(f"{count} x full", medians(full), copy_s)
    print_row(f"{count} x delta", medians([rig.sync(0.01) for _ in range(runs)]), copy_s)
    under_way = rig.generate()
    busy = [rig.sync(1) for _ in range(runs)]
    unfinished = ray.wait(under_way, num_returns=len(under_way), timeout=0)[1]
    note = "" if unfinished else " (generation ended before)"
    print_row(f"{count} x full, generating{note}", medians(busy), copy_s)
    print(f"  publish's probe {medians(full)['probe']:.3f} s")
    rig.close()


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        config = make_config(Path(directory), arguments)
        connection = connect(config, demand_of(config))
        columns = ("sync", "MB sent", "publish s", "load s", "total s", "copies", "unproved")
        print(f"| {' | '.join(columns)} | stall ms | stall/load |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for count in arguments.generators:
            measure(config, count, arguments.runs)
        disconnect(connection)


if __name__ == "__main__":
    main()
