"""Native transports between the learner's process and the generators': see `weights.transport`.

No GPU has run this yet. The store gets every version too, for whoever did not take part.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from raygrpo.actors.generator import GeneratorActor, LoadReport
from raygrpo.actors.pool.workers import Worker
from raygrpo.actors.process import in_new_thread
from raygrpo.config import RunConfig
from raygrpo.types import Version
from raygrpo.weights.native import NativeTransfer, TransferResult
from raygrpo.weights.types import Probe, WeightsManifest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ActorReceiver:
    """A generator's end, for the learner's process; ``probe`` goes with the version."""

    actor: Any
    num_workers: int
    probe: Probe | None = field(default=None, compare=False)

    def join(self, init_info: Mapping[str, Any]) -> Future[None]:
        """As `Receiver`."""
        return self._call("join", dict(init_info))

    def begin(self) -> Future[None]:
        """As `Receiver`."""
        return self._call("begin", None)

    def receive(self, update_info: Mapping[str, Any]) -> Future[None]:
        """As `Receiver`."""
        return self._call("receive", dict(update_info))

    def finish(self, version: Version) -> Future[None]:
        """As `Receiver`; the generator proves the version when it is told to load."""
        manifest = WeightsManifest(
            version=version, kind="full", base_version=None, buckets=(), probe=self.probe
        )
        return self._call("finish", manifest)

    def _call(self, call: str, argument: Any) -> Future[None]:
        future: Future[None] = self.actor.transfer.remote(call, argument).future()
        return future


class LearnerTransfer:
    """The sender of rank 0; other ranks only help to gather.

    Raises:
        ConfigError: rank 0 has no GPU.
    """

    def __init__(self, config: RunConfig, rank: int, host: str) -> None:
        options = config.generators.options
        self._num_workers = options.get("tensor_parallel_size", 1) * options.get(
            "pipeline_parallel_size", 1
        )
        self._native: NativeTransfer | None = None
        if rank == 0:
            from raygrpo.engines.vllm.native import make_sender

            sender = make_sender(config.weights.transport, host)
            self._native = NativeTransfer(sender, config.ray.timeouts_s.sync)

    def send(
        self,
        version: Version,
        tensors: Iterable[tuple[str, Tensor]],
        probe: Probe | None,
        generators: Mapping[str, Any],
    ) -> TransferResult:
        """Sends a version to these generators; reads ``tensors`` to the end in any case."""
        result = TransferResult()
        left: Iterator[Any] = iter(tensors)
        if self._native is not None:
            from raygrpo.engines.vllm.native import gpu_buckets

            receivers = {
                name: ActorReceiver(actor, self._num_workers, probe)
                for name, actor in generators.items()
            }
            result = self._native.sync(version, gpu_buckets(left), receivers)
        for _ in left:
            pass
        return result


def wanted(config: RunConfig) -> bool:
    """Whether versions are to go to generators directly."""
    return config.weights.transport != "store"


class ReceivingGenerator(GeneratorActor):
    """A generator whose versions come from the learner, or as any other's from the store."""

    _sent: WeightsManifest | None = None  # what the engine holds from the learner

    async def transfer(self, call: str, argument: Any) -> None:
        """A call of the learner's to this engine, as `raygrpo.weights.native.Receiver` has it.

        From ``begin`` to the end of ``finish`` nothing else loads; what is written after that is
        answered once `load` has proven the version. A transfer that is not finished leaves an
        engine that loads nothing more: it is replaced.
        """
        engine: Any = self._engine
        if call == "begin":
            await self._loading.acquire()
            self._unproven = self._unproven or []
        value = argument.version if call == "finish" else argument
        await asyncio.wrap_future(await self._on_engine(lambda: engine.transfer(call, value)))
        if call == "finish":
            await self._on_engine(lambda: engine.hold(value))
            self._sent = argument
            self._loading.release()

    async def _load(self) -> LoadReport:
        """Proves what the learner sent; pulls as any other where the store has a newer version."""
        started = time.monotonic()
        if self._sent is not None:
            async with self._loading:
                sent = self._sent
                await self._prove(sent)
                self._sent = replace(sent, probe=None)
                assert self._store is not None
                newest = await asyncio.wrap_future(in_new_thread(self._store.newest, "newest"))
            if newest is not None and newest <= sent.version:
                return LoadReport(
                    version=sent.version,
                    kind="none",
                    num_bytes=0,
                    full_bytes=0,
                    load_s=time.monotonic() - started,
                    stall_s=0.0,
                    probe_gap=self._probe.last_gap,
                    idle=self._idle.read(),
                )
        report = await super()._load()
        self._sent = None
        return report


def receivers(config: RunConfig, generators: Sequence[Worker]) -> dict[str, Any]:
    """The generators to send a version to now, by names that no replacement has; none unless the
    configuration wants it."""
    if not wanted(config):
        return {}
    return {
        _name(worker): worker.actor
        for worker in generators
        if worker.ready and worker.loading is None and not worker.asleep
    }


def broken(generators: Sequence[Worker], reasons: Mapping[str, str]) -> list[tuple[Worker, str]]:
    """Those of the generators that a sync may have left half-loaded, and why."""
    return [(worker, reasons[_name(worker)]) for worker in generators if _name(worker) in reasons]


def _name(worker: Worker) -> str:
    return f"{worker.name}/{worker.pid}"
