"""The two ends of a weight sync: a sender in each learner rank, a receiver in each generator.

    LearnerActor.publish -> StoreSender -> weight store <- pulled by - StoreReceiver -> engine

`raygrpo.actors.transport` chooses both ends once. The ends for native transports, in
`raygrpo.actors.native_transfer`, are these with a direct way beside the store.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from raygrpo.actors.engine_thread import EngineThread
from raygrpo.actors.idle import IdleReading
from raygrpo.actors.process import in_new_thread
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.engines.engine_weights import EngineWeights
from raygrpo.engines.probe import ProbeCheck
from raygrpo.types import Completion, Group, Stream, Version
from raygrpo.weights.types import Probe, PublishReport, WeightsManifest, WholeKind

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Partials = tuple[Completion, ...]
Answer = Group | Partials
GroupKey = tuple[Stream, int, int]


class WeightSource(Protocol):
    """A learner rank's weights. Reading them is collective: all ranks read to the end."""

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The whole model's tensors."""

    def adapter_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The adapter's tensors; none without LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A finished load: the version in use, and the cost of the load.

    Attributes:
        kind: what was pulled: nothing (``none``), deltas, or a whole version and deltas on it
            (``full``).
        num_bytes: the bytes that were pulled, such as 2.1e6 for ``full_bytes`` of 269e6.
        load_s: from the call to the end of the proof.
        stall_s: the part of it in which nothing was decoded.
        probe_s: the part of it that the proof took.
        probe_gap: the last probe's gap in nats.
    """

    version: Version
    kind: Literal["none", "delta", "full"]
    num_bytes: int
    full_bytes: int
    load_s: float
    stall_s: float
    probe_s: float = 0.0
    probe_gap: float | None = None
    idle: IdleReading | None = None


class Proof:
    """Withholds answers until the weights that wrote them are proven.

    ``release`` takes each answer that may leave. ``beside_decoding`` proves on another thread,
    while the engine decodes.

    Attributes:
        check: the checks of this generator's probes.
    """

    def __init__(
        self,
        check: ProbeCheck,
        thread: EngineThread,
        release: Callable[[GroupKey, Answer], None],
        *,
        beside_decoding: bool,
    ) -> None:
        self.check = check
        self._thread, self._release, self._beside_decoding = thread, release, beside_decoding
        self._withheld: list[tuple[GroupKey, Answer]] | None = None

    def withhold(self) -> None:
        """Keeps answers from now on, until `prove`."""
        if self._withheld is None:
            self._withheld = []

    def give(self, key: GroupKey, answer: Answer) -> None:
        """Releases an answer, now or after the proof."""
        if self._withheld is None:
            self._release(key, answer)
        else:
            self._withheld.append((key, answer))

    async def prove(self, manifest: WeightsManifest) -> float:
        """Checks the version in use by its probe, then releases; the seconds of the check.

        Decoding does not wait for the proof, and a version that fails has answered nothing.

        Raises:
            ProbeFailed: the engine computes other logprobs than the learner.
        """
        started = time.monotonic()
        if manifest.probe is not None:
            engine, version = self._thread.engine, manifest.version
            check = partial(self.check.check, engine, manifest.probe, version)
            if self._beside_decoding:
                await asyncio.wrap_future(in_new_thread(check, "probe"))
            else:
                await self._thread.run(check)
        answers, self._withheld = self._withheld or [], None
        for key, answer in answers:
            self._release(key, answer)
        return time.monotonic() - started


class StoreSender:
    """A learner rank's end. Every rank publishes; rank 0 sends, the others help to gather."""

    def __init__(self, store: StoreHandle, *, rank: int, local: bool, lora: bool) -> None:
        # Publishing needs torch, which the driver does without.
        from raygrpo.weights.publisher import Publisher

        self._lora = lora
        self._publisher = None if rank else Publisher(store, local=local)

    def publish(
        self,
        version: Version,
        source: WeightSource,
        probe: Probe | None,
        generators: Mapping[str, Any],
    ) -> PublishReport | None:
        """Publishes into the weight store; the report is rank 0's.

        ``generators`` are ready to take the version directly, by the names of their processes.
        Here they pull instead.
        """
        tensors = source.adapter_weights() if self._lora else source.named_weights()
        if self._publisher is None:
            deque(tensors, maxlen=0)
            return None
        kind: WholeKind = "adapter" if self._lora else "full"
        return self._publisher.publish(version, tensors, kind, probe)


class StoreReceiver:
    """A generator's end, which pulls versions from the weight store. One load runs at a time."""

    def __init__(
        self, store: StoreHandle, weights: EngineWeights, thread: EngineThread, proof: Proof
    ) -> None:
        self._store, self._weights = store, weights
        self._thread, self._proof = thread, proof
        self._asleep = False
        self._loading = asyncio.Lock()  # held while the engine's weights change

    async def load(self) -> LoadReport:
        """Pulls the newest version, stages it beside decoding, commits and proves it.

        An engine that sleeps is woken.
        """
        started = time.monotonic()
        weights, engine = self._weights, self._thread.engine
        stall_s = probe_s = 0.0
        async with self._loading:
            links = await self._store.pull(weights.version)
            if self._asleep:  # after the pull: if the store is empty, the learner needs the device
                await self._thread.run(engine.wake)
            if links:
                stage = partial(weights.stage, links)
                await asyncio.wrap_future(in_new_thread(stage, "stage"))
                self._proof.withhold()
                stall_s, old = await self._thread.run(lambda: _timed(weights.commit))
                in_new_thread(old.clear, "release")  # unmapping takes longer than the commit
                probe_s = await self._proof.prove(weights.manifest)
            elif self._asleep and engine.version is None:
                self._proof.withhold()
                stall_s, _ = await self._thread.run(lambda: _timed(weights.load_again))
                probe_s = await self._proof.prove(weights.manifest)
            self._asleep = False  # if a load fails before this line, the next one wakes the engine
            held = weights.manifest
        whole = bool(links) and links[0][0].kind != "delta"
        return LoadReport(
            version=held.version,
            kind="full" if whole else "delta" if links else "none",
            num_bytes=sum(manifest.sent_bytes for manifest, _ in links),
            full_bytes=held.num_bytes,
            load_s=time.monotonic() - started,
            stall_s=stall_s,
            probe_s=probe_s,
            probe_gap=self._proof.check.last_gap,
            idle=self._thread.idle.read(),
        )

    async def sleep(self) -> None:
        """Has the engine free its device until the next `load`."""
        async with self._loading:
            await self._thread.run(self._thread.engine.sleep)
            self._asleep = True


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    started = time.monotonic()
    value = call()
    return time.monotonic() - started, value
