"""Both ends of a sync by a native transport (NCCL, CUDA IPC), between Ray actors.

    NativeSender -> GeneratorActor.transfer -> NativeReceiver -> engine

`raygrpo.weights.native` is the protocol of a sync. The store gets every version too, for generators
that did not take part. This module is imported only if ``weights.transport`` is ``nccl`` or
``ipc``. No GPU has run it yet.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, cast

import ray

from raygrpo.actors.process import in_new_thread
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.actors.weight_sync import LoadReport, StoreReceiver, StoreSender, WeightSource
from raygrpo.config import RunConfig
from raygrpo.engines.base import Engine
from raygrpo.types import Version
from raygrpo.weights.native import Begin, Finish, Message, NativeTransfer, Receiver
from raygrpo.weights.types import Probe, PublishReport, WeightsManifest


def receiver_of(actor: Any) -> Receiver:
    """A generator's actor as a `Receiver` in the learner's process."""
    return lambda message: cast("Future[None]", actor.transfer.remote(message).future())


class NativeSender(StoreSender):
    """Sends each version to the generators that are ready, then publishes it to the store.

    Raises:
        ConfigError: rank 0 has no GPU.
    """

    def __init__(self, config: RunConfig, store: StoreHandle, *, rank: int, local: bool) -> None:
        super().__init__(store, rank=rank, local=local, lora=False)
        self._native: NativeTransfer | None = None
        if rank == 0:
            # It imports vLLM, which other ranks do without.
            from raygrpo.engines.vllm.native import make_sender

            sender = make_sender(config.weights.transport, ray.util.get_node_ip_address())
            sizes = ("tensor_parallel_size", "pipeline_parallel_size")
            num_workers = math.prod(config.generators.options.get(size, 1) for size in sizes)
            self._native = NativeTransfer(sender, config.ray.timeouts_s.sync, num_workers)

    def publish(
        self,
        version: Version,
        source: WeightSource,
        probe: Probe | None,
        generators: Mapping[str, Any],
    ) -> PublishReport | None:
        """See `StoreSender`; the report names generators that may be half-loaded."""
        broken: Mapping[str, str] = {}
        if generators:
            tensors = iter(source.named_weights())
            if self._native is not None:
                # It imports vLLM, which other ranks do without.
                from raygrpo.engines.vllm.native import gpu_buckets

                manifest = WeightsManifest(version=version, buckets=(), probe=probe)
                receivers = {name: receiver_of(actor) for name, actor in generators.items()}
                broken = self._native.sync(manifest, gpu_buckets(tensors), receivers)
            deque(tensors, maxlen=0)  # after a failure too: the other ranks gather to the end
        report = super().publish(version, source, probe, generators)
        return replace(report, broken=broken) if report else None


class ReceivingEngine(Engine, Protocol):
    """An engine that takes versions directly."""

    def transfer(self, message: Message) -> Future[None]:
        """The engine's end, a `Receiver`."""

    def hold(self, version: Version | None) -> None:
        """Says which version the engine holds: none during a transfer."""


class NativeReceiver(StoreReceiver):
    """Takes versions from the learner, and pulls where the store has a newer one."""

    _sent: WeightsManifest | None = None  # of the version that the engine has directly

    async def transfer(self, message: Message) -> None:
        """Passes a message on to the engine.

        From `Begin` to the end of `Finish` nothing else loads. Answers written after it are
        withheld until `load` has proven the version. An engine whose transfer does not finish loads
        nothing more and is replaced.
        """
        engine = cast(ReceivingEngine, self._thread.engine)
        if isinstance(message, Begin):
            await self._loading.acquire()
            self._proof.withhold()
            await self._thread.run(lambda: engine.hold(None))
        await asyncio.wrap_future(await self._thread.run(lambda: engine.transfer(message)))
        if isinstance(message, Finish):
            self._sent = sent = message.manifest
            await self._thread.run(lambda: engine.hold(sent.version))
            self._loading.release()

    async def load(self) -> LoadReport:
        """Proves the version from the learner; pulls if the store has a newer one."""
        started = time.monotonic()
        if self._sent is not None:
            async with self._loading:
                sent = self._sent
                probe_s = await self._proof.prove(sent)
                self._sent = replace(sent, probe=None)
                newest = await asyncio.wrap_future(in_new_thread(self._store.newest, "newest"))
            if newest is not None and newest <= sent.version:
                return LoadReport(
                    version=sent.version,
                    kind="none",
                    num_bytes=0,
                    full_bytes=0,
                    load_s=time.monotonic() - started,
                    stall_s=0.0,
                    probe_s=probe_s,
                    probe_gap=self._proof.check.last_gap,
                    idle=self._thread.idle.read(),
                )
        report = await super().load()
        self._sent = None
        return report
