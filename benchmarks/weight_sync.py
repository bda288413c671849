"""Weight sync, from the learner's tensors to weights in use, against one memory copy of the bytes.

    python benchmarks/weight_sync.py [--layers 20] [--generators 1 4] [--runs 5]
    python benchmarks/weight_sync.py --engine vllm     # reported beside, where it is installed

Everything is real: a process that publishes as the learner does (tensors copied out, buckets,
checksums, the weight store), and generator actors that pull, build, pack, swap and prove it by the
probe. The model is randomly initialised, of SmolLM2-135M's widths. A full snapshot changes every
weight; a delta changes 1 % of them. ``copies`` is the total in memory copies, ``unproved`` that
without the two forward passes of the probe; two publishes before the first run are not counted.
``stall`` is what decoding is held up by a load while generation goes on, also as a share of the
load without its proof. ``decoding`` is the tokens per second that generators write from the publish
to the last load, as a share of what they write as long without one: learner, store and generators
share this machine's cores here, which costs more than the stall.

Bars of the transformers engine, the exit code is 1 where one is missed: from the learner's tensors
to weights in use a full sync takes at most 8 copies for one generator and 12 for four; the stall of
one generator is below 10 % of the load (four on these cores wait for each other).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import ray

from benchmarks.gpu_cases import make_request
from benchmarks.rollout_throughput import save_smollm2_shape
from raygrpo.actors.cluster.connect import connect, disconnect
from raygrpo.actors.generator import GeneratorActor
from raygrpo.actors.process import spawn
from raygrpo.actors.weight_store import StoreHandle, start_store
from raygrpo.config import ModelSection, RunConfig
from raygrpo.config.file import load_config
from raygrpo.engines.select import make_engine
from raygrpo.models import DTYPES, load_model
from raygrpo.types import Group, Version
from raygrpo.weights.probe import probe_tokens
from raygrpo.weights.publisher import Publisher
from raygrpo.weights.types import Probe, PublishReport

TIMEOUT_S = 300.0
# By number of generators, in memory copies of the weights.
COPY_BARS = {1: 8.0, 4: 12.0}
STALL_BAR = 0.1


class CountingEngine:
    """An engine that counts the tokens it writes; all else is the engine's own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.num_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[Group]:
        """A step of the engine, its tokens counted where it says them."""
        if (table := getattr(self._engine, "rows", None)) is not None:
            self.num_tokens += table.num_rows  # each running completion gets one
        return self._engine.step()


def counting_engine(config: RunConfig, *, threads: int, version: Version | None) -> Any:
    """The engine that a generator makes, counting."""
    return CountingEngine(make_engine(config, threads=threads, version=version))


class CountingGenerator(GeneratorActor):
    """A generator that says how many tokens it has written."""

    def num_tokens(self) -> int | None:
        """None where the engine writes in processes of its own."""
        vllm = self._config.generators.engine == "vllm"
        return None if vllm else cast(CountingEngine, self.engine).num_tokens


class Source:
    """Publishes a model's weights as a learner's rank 0 does, without the learner's memory."""

    def __init__(self, model: ModelSection, store: StoreHandle, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = load_model(model, seed=0, dtype=DTYPES[model.dtype]).requires_grad_(False)
        self._publisher = Publisher(store, local=True)

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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--model", help="directory of a model without weights; none: see --layers")
    parser.add_argument("--layers", type=int, default=20, help="20: 0.40 GB in float32")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=400, help="of a generating completion")
    return parser.parse_args(arguments)


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
    if arguments.model:
        model = Path(arguments.model)
    else:
        model = save_smollm2_shape(directory / "model")
        shape = json.loads((model / "config.json").read_text())
        shape["num_hidden_layers"] = arguments.layers
        (model / "config.json").write_text(json.dumps(shape))
    return load_config(
        {
            "model": {"path": str(model), "random_init": True, "dtype": arguments.dtype},
            "data": {"source": "none.jsonl"},
            "train": {"max_staleness": 1},
            "generators": {"engine": arguments.engine},
            "ray": {"address": "local"},
        }
    )


class Rig:
    """One source, one store, and generators that keep generating while asked to."""

    def __init__(self, config: RunConfig, count: int, new_tokens: int) -> None:
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // count)
        self._new_tokens = new_tokens
        self.store = start_store()
        self.source = spawn(Source, config.model, self.store, cores, num_cpus=0)
        options = {"num_cpus": 0, "max_concurrency": 1000}
        given = (config, self.store, threads, None, counting_engine)
        self.generators = [spawn(CountingGenerator, *given, **options) for _ in range(count)]
        ray.get([g.start.remote(None) for g in self.generators], timeout=TIMEOUT_S)
        self.step = -1

    def num_tokens(self) -> float:
        """Tokens that all generators have written; NaN where that is not known."""
        counts = ray.get([g.num_tokens.remote() for g in self.generators], timeout=TIMEOUT_S)
        return float("nan") if None in counts else float(sum(counts))

    def sync_while_generating(self) -> dict[str, float]:
        """A full sync, and as long without one; ``decoding`` is the ratio of their tokens/s."""
        found = self.sync(1)
        started, before = time.perf_counter(), self.num_tokens()
        time.sleep(found["total"])
        alone = (self.num_tokens() - before) / (time.perf_counter() - started)
        rate = found["num_tokens"] / found["total"]
        return {**found, "decoding": rate / alone if alone else float("nan")}

    def sync(self, share: float) -> dict[str, float]:
        """One publish and all loads: seconds and bytes."""
        self.step += 1
        ray.get(self.source.change.remote(share), timeout=TIMEOUT_S)
        before = self.num_tokens()
        started = time.perf_counter()
        probe_s, report = ray.get(
            self.source.publish.remote(Version(1, self.step)), timeout=TIMEOUT_S
        )
        published = time.perf_counter()
        loads = ray.get([g.load.remote() for g in self.generators], timeout=TIMEOUT_S)
        ended = time.perf_counter()
        return {
            "num_tokens": self.num_tokens() - before,
            "total": ended - started,
            "publish": published - started,
            "probe": probe_s,
            "load": ended - published,
            "load_s": max(load.load_s for load in loads),
            "proof": probe_s + max(load.probe_s for load in loads),
            "stall_s": max(load.stall_s for load in loads),
            "stall_frac": max(load.stall_s / (load.load_s - load.probe_s) for load in loads),
            "num_bytes": float(report.num_bytes),
            "full_bytes": float(report.full_bytes),
        }

    def generate(self) -> list[Any]:
        """Starts a long group on every generator."""
        request = make_request(self.step, range(1, 65), 16, self._new_tokens, exactly=True)
        request = replace(request, min_version=Version(1, self.step))
        return [g.generate.options(num_returns=2).remote(request)[0] for g in self.generators]

    def close(self) -> None:
        """Ends all actors."""
        for actor in (self.source, *self.generators):
            ray.kill(actor)
        self.store.close()


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def print_row(name: str, row: dict[str, float], copy_s: float) -> None:
    decoding = f"{row['decoding']:.0%}" if "decoding" in row else ""
    print(
        f"| {name} | {row['num_bytes'] / 1e6:.1f} | {row['publish']:.2f} | {row['load']:.2f} | "
        f"{row['total']:.2f} | {row['total'] / copy_s:.1f} | "
        f"{(row['total'] - row['proof']) / copy_s:.1f} | {row['stall_s'] * 1e3:.0f} | "
        f"{row['stall_frac']:.1%} | {decoding} |",
        flush=True,
    )


def measure(config: RunConfig, count: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Prints the lines of so many generators; copies of a full sync (unproved), stall's share."""
    runs, rig = arguments.runs, Rig(config, count, arguments.new_tokens)
    rig.sync(1)
    warm = rig.sync(1)
    rig.sync(1)
    copies, full = [], []
    for _ in range(runs):
        copies.append(memory_copy_s(int(warm["full_bytes"]), 3))
        full.append(rig.sync(1))
    copy_s = statistics.median(copies)
    print(f"| one copy | {warm['full_bytes'] / 1e6:.1f} | | | {copy_s:.3f} | 1.0 | 1.0 | | | |")
    print_row(f"{count} x full", medians(full), copy_s)
    print_row(f"{count} x delta", medians([rig.sync(0.01) for _ in range(runs)]), copy_s)
    under_way = rig.generate()
    busy = [rig.sync_while_generating() for _ in range(runs)]
    unfinished = ray.wait(under_way, num_returns=len(under_way), timeout=0)[1]
    note = "" if unfinished else " (generation ended before)"
    print_row(f"{count} x full, generating{note}", medians(busy), copy_s)
    print(f"  publish's probe {medians(full)['probe']:.3f} s")
    rig.close()
    row = medians(full)
    return (row["total"] - row["proof"]) / copy_s, medians(busy)["stall_frac"]


def verdict(engine: str, found: dict[int, tuple[float, float]]) -> bool:
    """Prints the bars, and whether they hold."""
    holds = True
    for count, (copies, stall) in found.items():
        bar = COPY_BARS.get(count) if engine == "transformers" else None
        line = f"{count} generators: {copies:.1f} copies unproved, stall {stall:.1%} of a load"
        if bar is None:
            print(f"{line}: no bar")
            continue
        good = copies <= bar and (count > 1 or stall < STALL_BAR)
        asked = f"at most {bar:.0f} copies" + (f", stall below {STALL_BAR:.0%}" * (count == 1))
        print(f"{line}: {asked}: {'holds' if good else 'FAILS'}")
        holds &= good
    return holds


def main(given: list[str] | None = None) -> int:
    """Prints the table; 1 when a bar is missed."""
    arguments = parse_arguments(given)
    with tempfile.TemporaryDirectory() as directory:
        config = make_config(Path(directory), arguments)
        connection = connect(config)
        columns = ("sync", "MB sent", "publish s", "load s", "total s", "copies", "unproved")
        print(f"| {' | '.join(columns)} | stall ms | stall/load | decoding |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        found = {count: measure(config, count, arguments) for count in arguments.generators}
        disconnect(connection)
    return 0 if verdict(arguments.engine, found) else 1


if __name__ == "__main__":
    sys.exit(main())
