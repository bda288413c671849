"""Generation and training that only take time: what benchmarks of the machinery put in their place.

The engine imports no torch, so that dozens of generators fit on a small machine. Everything around
the two is the real thing: driver, actors, scorers, weight store, rollout store, checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import xxhash

from raygrpo.actors.cluster.site import Site
from raygrpo.actors.futures import Pending
from raygrpo.actors.learner import LearnerGroup
from raygrpo.actors.pool.pool import RolloutPool
from raygrpo.actors.process import spawn
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.commands.train import run
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.tracking.files import read_metrics
from raygrpo.types import (
    ByteArray,
    Completion,
    FloatArray,
    Group,
    GroupRequest,
    Stat,
    StepBatch,
    StepResult,
    Stream,
    Version,
)
from raygrpo.weights.types import BucketSpec, PublishReport, TensorSpec, WeightsManifest
from tests.tiny import save_tiny_model

WEIGHT_BYTES = 2**16
LOOK_FRAC = 0.01  # how long a step may keep a command waiting, in times of a group

REWARD = """
def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


@dataclass(slots=True)
class _Writing:
    """A group that is being written: ``marks`` are the versions and when each came."""

    request: GroupRequest
    started: float
    seconds: float
    marks: list[tuple[float, Version]]


class SimulatedEngine:
    """Writes each group in ``group_s`` seconds, give or take ``spread``, ``max_rows`` rows at once.

    Implements `raygrpo.engines.base.Engine`; the completions' arrays are real.
    """

    def __init__(
        self, config: RunConfig, version: Version | None, *, group_s: float, spread: float
    ) -> None:
        self._max_rows = config.generators.max_rows
        self._group_s, self._spread = group_s, spread
        self.version = version
        self._staged: Version | None = None
        self._waiting: dict[tuple[Stream, int], GroupRequest] = {}
        self._writing: dict[tuple[Stream, int], _Writing] = {}

    @property
    def num_unfinished(self) -> int:
        """Groups submitted and not yet returned or aborted."""
        return len(self._waiting) + len(self._writing)

    @property
    def can_step(self) -> bool:
        """Whether anything is being written or could be."""
        version = self.version
        if version is None:
            return False
        due = any(request.min_version <= version for request in self._waiting.values())
        return bool(self._writing) or due

    def submit(self, request: GroupRequest) -> None:
        """Queues a group."""
        self._waiting[request.stream, request.group_id] = request

    def step(self) -> list[Group]:
        """Sleeps until a group is written, or a moment."""
        assert self.version is not None
        now = time.monotonic()
        for key, request in list(self._waiting.items()):
            rows = sum(w.request.sampling.num_completions for w in self._writing.values())
            if rows and rows + request.sampling.num_completions > self._max_rows:
                break
            if request.min_version <= self.version:
                del self._waiting[key]
                draw = np.random.default_rng((request.seed, request.group_id)).uniform(-1, 1)
                seconds = self._group_s * (1 + self._spread * draw)
                self._writing[key] = _Writing(request, now, seconds, [(now, self.version)])
        ends = [writing.started + writing.seconds for writing in self._writing.values()]
        time.sleep(max(0.0, min([LOOK_FRAC * self._group_s, *(end - now for end in ends)])))
        now = time.monotonic()
        done = [key for key, w in self._writing.items() if w.started + w.seconds <= now]
        return [_group(self._writing.pop(key)) for key in done]

    def stage_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Reads the version's bytes."""
        assert sum(bucket.nbytes for bucket in buckets) == manifest.num_bytes
        self._staged = manifest.version

    def commit_weights(self) -> None:
        """Writes with the staged version from now on."""
        assert self._staged is not None
        self.version = self._staged
        for writing in self._writing.values():
            writing.marks.append((time.monotonic(), self.version))

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Stages and commits a version."""
        self.stage_weights(manifest, buckets)
        self.commit_weights()

    def abort(self, stream: Stream, group_id: int) -> list[Completion]:
        """Drops a group, and what was written of it."""
        self._waiting.pop((stream, group_id), None)
        self._writing.pop((stream, group_id), None)
        return []

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        """All alike."""
        return np.full(len(token_ids), -1.0, np.float32)

    def sleep(self) -> None:
        """Holds nothing that could be freed."""

    def wake(self) -> None:
        """Nothing was freed."""

    def close(self) -> None:
        """Drops all groups."""
        self._waiting, self._writing = {}, {}


def _group(writing: _Writing) -> Group:
    request, length = writing.request, writing.request.sampling.max_tokens
    starts = [(when - writing.started) / writing.seconds for when, _ in writing.marks]
    places = [min(length, round(share * length)) for share in starts] + [length]
    runs = tuple(
        (version, stop - start)
        for (_, version), start, stop in zip(writing.marks, places, places[1:], strict=False)
        if stop > start
    )
    rng = np.random.default_rng(request.group_id)
    completions = []
    for _ in range(request.sampling.num_completions):
        tokens = rng.integers(3, 60, length).astype(np.int32)
        completions.append(
            Completion(
                token_ids=tokens,
                logprobs=np.full(length, -1.0, np.float32),
                loss_mask=np.ones(length, np.bool_),
                text="".join("0123456789abcdefghij"[token % 20] for token in tokens),
                finish="length",
                version_runs=runs,
            )
        )
    return Group(
        request=request,
        completions=tuple(completions),
        generate_s=time.monotonic() - writing.started,
    )


def make_engine(
    config: RunConfig, *, threads: int, version: Version | None, group_s: float, spread: float
) -> SimulatedEngine:
    """What a generator's actor calls; pickled to it with its last two arguments bound."""
    return SimulatedEngine(config, version, group_s=group_s, spread=spread)


class SimulatedLearnerActor:
    """A learner whose update takes ``update_s``; it fetches the payloads and publishes bytes."""

    def __init__(self, update_s: float) -> None:
        self._update_s = update_s

    def update(self, batch: StepBatch, incarnation: int) -> StepResult:
        """Fetches the step's groups and trains them for as long as it is told to."""
        started = time.monotonic()
        ray.get(list(batch.payloads.values()))
        time.sleep(max(0.0, self._update_s - (time.monotonic() - started)))
        version = Version(incarnation, batch.step + 1)
        seconds = time.monotonic() - started
        return StepResult(version=version, stats={"loss": Stat.of(0.0)}, seconds=seconds)

    def publish(self, version: Version, store: StoreHandle) -> PublishReport:
        """Gives the store a whole version, a small one."""
        data = np.full(WEIGHT_BYTES, version.step % 251, np.uint8)
        tensor = TensorSpec(
            name="w", dtype="uint8", shape=data.shape, offset_bytes=0, num_bytes=data.size
        )
        spec = BucketSpec(
            tensors=(tensor,), num_bytes=data.size, checksum=xxhash.xxh3_64_intdigest(data.data)
        )
        store.put(version, 0, data, encoded=False)()
        store.commit(WeightsManifest(version=version, buckets=(spec,)))
        return PublishReport(
            version=version,
            kind="full",
            num_bytes=data.size,
            full_bytes=data.size,
            changed_frac=None,
        )

    def save(self) -> None:
        """Has no state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuReading:
    """Seconds: a clock, CPU time of the machine's cores and of this process."""

    clock: float
    machine: float
    process: float

    @classmethod
    def now(cls) -> CpuReading:
        """As of now."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # What a guest used is a part of user time already.
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return cls(
            clock=time.monotonic(),
            machine=sum(times) - idle - guest,
            process=time.process_time(),
        )


class SimulatedLearner(LearnerGroup):
    """All that a run asks of its learner, over one `SimulatedLearnerActor`.

    Attributes:
        readings: the CPU time used when each step's update began.
    """

    def __init__(self, config: RunConfig, store: StoreHandle, update_s: float) -> None:
        self._config, self._store = config, store
        self.readings: dict[int, CpuReading] = {}
        self._actor = spawn(SimulatedLearnerActor, update_s, num_cpus=0)

    def start(self) -> Pending[list[int]]:
        """Nothing is to be joined."""
        return self._one(self._actor.save.remote(), lambda _: [])

    def update(self, batch: StepBatch, incarnation: int) -> Pending[StepResult]:
        """Trains one step."""
        self.readings[batch.step] = CpuReading.now()
        return self._one(self._actor.update.remote(batch, incarnation))

    def publish(self, version: Version, generators: Mapping[str, Any]) -> Pending[PublishReport]:
        """Publishes ``version`` to the store."""
        return self._one(self._actor.publish.remote(version, self._store))

    def save(self, directory: Path) -> Pending[None]:
        """Saves the model that nothing has changed."""
        shutil.copytree(self._config.model.path, directory / "model")
        return self._one(self._actor.save.remote())

    def close(self) -> None:
        """Ends the actor."""
        ray.kill(self._actor)

    def _one(self, ref: Any, combine: Any = lambda values: values[0]) -> Pending[Any]:
        return Pending("simulated learner", [ref], 120.0, combine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run's rows of metrics, after the warm-up, and what the driver did for a group.

    ``readings`` are of the beginnings of all updates, by step from 0.
    """

    rows: list[dict[str, Any]]
    driver_ms_per_group: float
    readings: Mapping[int, CpuReading]

    def values(self, name: str) -> list[float]:
        """One metric by step."""
        return [row[name] for row in self.rows if name in row]

    def cpu_use(self, steps: int) -> tuple[float, float]:
        """Over the first so many rows: the share of the machine's cores in use, and this process's
        CPU seconds per second."""
        # The update of the row before ended where these rows begin.
        begin = self.readings[self.rows[0]["step"] - 2]
        end = self.readings[self.rows[min(steps, len(self.rows)) - 1]["step"] - 1]
        seconds = end.clock - begin.clock
        machine = (end.machine - begin.machine) / seconds / (psutil.cpu_count() or 1)
        return machine, (end.process - begin.process) / seconds


def simulate(
    directory: Path,
    name: str,
    *,
    group_s: float,
    update_s: float,
    spread: float = 0.0,
    warmup: int = 2,
    **sections: dict[str, Any],
) -> Measured:
    """Runs a training with these times in a directory of its own; leaves out ``warmup`` steps."""
    model = directory / "model"
    if not model.exists():
        save_tiny_model(model)
        rows = [{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]
        (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (directory / "reward.py").write_text(REWARD)
    base: dict[str, Any] = {
        "run_dir": str(directory / name),
        "model": {"path": str(model)},
        "data": {"source": str(directory / "rows.jsonl"), "max_prompt_length": 16},
        "rewards": [{"func": f"{directory / 'reward.py'}:digits"}],
        "generators": {"engine": "transformers"},
        "ray": {"address": "local"},
    }
    for section, keys in sections.items():
        base[section] = {**base.get(section, {}), **keys}
    config = load_config(base)
    engine = functools.partial(make_engine, group_s=group_s, spread=spread)
    learners: list[SimulatedLearner] = []

    def make_workers(
        config: RunConfig, store: StoreHandle, functions: Mapping[str, bytes], site: Site
    ) -> tuple[LearnerGroup, RolloutPool]:
        learners.append(SimulatedLearner(config, store, update_s))
        return learners[0], RolloutPool(config, store, functions, site, engine)

    with (directory / f"{name}.log").open("w") as log, contextlib.redirect_stdout(log):
        outcome = run(config, make_workers=make_workers)
    logged = read_metrics(directory / name / "metrics.jsonl")
    return Measured(
        rows=[row for row in logged if row["step"] > warmup],
        driver_ms_per_group=outcome.driver_ms_per_group,
        readings=learners[0].readings,
    )
