"""The fast engine: vLLM behind the engine protocol, weights updated in place."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from raygrpo.config import ModelSection, Transport
from raygrpo.engines.hf.model_weights import check_manifest, unpack_all
from raygrpo.engines.randomness import row_keys, uniforms
from raygrpo.engines.requests import Admission, Running, not_finite
from raygrpo.engines.stops import StopStrings
from raygrpo.engines.vllm.client import SharedVersion, VllmClient
from raygrpo.engines.vllm.requests import (
    engine_arguments,
    make_completion,
    sampling_params,
    version_label,
)
from raygrpo.errors import InfraError
from raygrpo.models import DTYPES, load_model, load_tokenizer, stop_token_ids
from raygrpo.types import ByteArray, Completion, FloatArray, Group, GroupRequest, Stream, Version
from raygrpo.weights.buckets import make_version, weight_targets
from raygrpo.weights.native import Message
from raygrpo.weights.shared import share
from raygrpo.weights.types import WeightsManifest

# The time that a step waits for a group. A command to the engine may wait as long.
STEP_WAIT_S: Final = 0.01


@dataclass(eq=False, slots=True)
class Sent(Running):
    """A group that vLLM has, since it was admitted under ``version``.

    ``future`` has its completions, those that were done before included.
    """

    version: Version
    aborted: bool = False
    future: concurrent.futures.Future[list[Completion]] = field(init=False)

    def name(self, index: int) -> str:
        """What vLLM calls a completion's request, such as ``17-0``."""
        return f"{self.serial}-{index}"

    @property
    def names(self) -> list[str]:
        """The names of all requests of the group."""
        return [self.name(index) for index in self.request.unfinished]


class VllmEngine:
    """Decodes groups with vLLM; implements `raygrpo.engines.base.Engine`.

    vLLM computes in processes of its own. Groups are handed over whole and in order, while there is
    room for ``max_rows`` completions. So no group waits inside vLLM while weights change. A prompt
    is computed once for its group (prefix caching), and never shared with a group that was admitted
    under other weights.
    """

    def __init__(
        self,
        model: ModelSection,
        *,
        seed: int,
        max_rows: int,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
        transport: Transport = "store",
        version: Version | None = None,
    ) -> None:
        with torch.device("meta"):  # the model's tensors without their data
            drawn = model.model_copy(update={"random_init": True})
            shape = load_model(drawn, seed=0, dtype=DTYPES[model.dtype])
        self._tokenizer = load_tokenizer(model)
        self._targets = weight_targets(shape)
        self._vocab_size = shape.get_input_embeddings().weight.shape[0]
        stop_ids = stop_token_ids(shape, self._tokenizer)
        self._stop_ids = sorted(token for token in stop_ids if token < self._vocab_size)
        self._stops = StopStrings(self._tokenizer)
        self._max_rows = max_rows
        self._can_sleep = bool((options or {}).get("enable_sleep_mode"))
        self._live: set[str] = set()  # names of vLLM's requests; two threads change the set
        self._done: queue.SimpleQueue[Sent] = queue.SimpleQueue()
        self._staged: SharedVersion | None = None
        self._version: Version | None = None
        self._client = VllmClient(
            engine_arguments(
                model,
                seed=seed,
                max_rows=max_rows,
                device=device,
                options=options or {},
                transport=transport,
            )
        )
        self.admission: Admission[Sent] = Admission(
            max_positions=self._client.max_positions, vocab_size=self._vocab_size
        )
        if version is not None:
            self._serve_disk(model, seed, version)

    def _serve_disk(self, model: ModelSection, seed: int, version: Version) -> None:
        if not model.random_init:
            self._client.call(self._client.ask("update_weight_version", version_label(version)))
            self._version = version
            return
        drawn = load_model(model, seed=seed, dtype=DTYPES[model.dtype])  # not as vLLM draws
        self.load_weights(*make_version(version, weight_targets(drawn).items()))

    @property
    def version(self) -> Version | None:
        """The version of the weights in use; None before the first load and after a failed one."""
        return self._version

    def _held(self) -> Version:
        if self._version is None:
            raise InfraError("the engine holds no version", "load weights first")
        return self._version

    @property
    def num_unfinished(self) -> int:
        """Groups submitted and not yet returned or aborted."""
        return self.admission.num_unfinished

    @property
    def can_step(self) -> bool:
        """Whether a step would make progress."""
        return self.admission.can_step(self._version)

    def submit(self, request: GroupRequest) -> None:
        """Queues a group; see `Admission.submit`."""
        self.admission.submit(request)

    def step(self) -> list[Group]:
        """Hands over the groups that fit; waits a moment for one to finish.

        Raises:
            NumericError: logprobs were not finite; the group is dropped, the others go on.
            InfraError: no version is loaded, or vLLM died.
        """
        admission, version = self.admission, self._held()
        for sent in admission.admit(version, self._fits, partial(self._start, version)):
            sent.future.add_done_callback(partial(self._report, sent))
        wait_s = STEP_WAIT_S if admission.running and not admission.has_finished else 0.0
        while True:
            try:
                sent = self._done.get(timeout=wait_s)
            except queue.Empty:
                return admission.take_finished()
            wait_s = 0.0
            if sent.serial in admission.running:
                self._finish(sent)

    def _report(self, sent: Sent, _: object) -> None:
        self._done.put(sent)

    def _fits(self, count: int) -> bool:
        return not self._live or len(self._live) + count <= self._max_rows

    def _start(self, version: Version, request: GroupRequest, serial: int) -> Sent:
        sent = Sent(request, serial, time.monotonic(), version)
        self._live.update(sent.names)
        sent.future = self._client.begin(self._generate(sent))
        return sent

    def _finish(self, sent: Sent) -> None:
        try:
            completions = self._client.result(sent.future)
            if not all(np.isfinite(completion.logprobs).all() for completion in completions):
                raise not_finite([sent], self._version)
        except BaseException:
            del self.admission.running[sent.serial]
            raise
        self.admission.finish(sent, completions)

    async def _generate(self, sent: Sent) -> list[Completion]:
        """All completions of a group, in order; finished partials of its request included."""
        indices = sent.request.unfinished
        tasks = [asyncio.ensure_future(self._complete(sent, index)) for index in indices]
        try:
            written = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one failed, the others end, which aborts them in vLLM
                task.cancel()
            self._live.difference_update(sent.names)
        done = dict(enumerate(sent.request.partials)) | dict(zip(indices, written, strict=True))
        return [done[index] for index in sorted(done)]

    async def _complete(self, sent: Sent, index: int) -> Completion:
        request, sampling = sent.request, sent.request.sampling
        before = request.partials[index] if request.partials else None
        written = [] if before is None else before.token_ids.tolist()
        if sent.aborted:  # aborted before vLLM had the request
            return before or _unwritten(sent.version)
        keys = row_keys(request.seed, request.stream, request.group_id, sampling.num_completions)
        number = uniforms(keys[index : index + 1], np.full(1, len(written), np.int64))
        params = sampling_params(
            sampling,
            seed=int(number[0] * 2.0**53),
            stop_ids=self._stop_ids,
            num_before=len(written),
        )
        ids = [*request.prompt.token_ids.tolist(), *written]
        name = sent.name(index)
        output = await self._client.generate(name, ids, params, sent.version)
        self._live.discard(name)
        return make_completion(
            output.outputs[0], sampling, sent.version, before, self._stops, self._tokenizer
        )

    def stage_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Copies a version to shared memory and verifies it there, on any thread.

        Raises:
            InfraError: the version does not fit the model, is older than the one in use, or is
                corrupt.
        """
        self._staged = None
        check_manifest(self._targets, manifest, self._version)
        buffers = [share(data) for data in buckets]
        unpack_all(manifest, (buffer.data for buffer in buffers))  # verifies the copies
        self._staged = SharedVersion(manifest, buffers)

    def commit_weights(self) -> None:
        """Loads the staged version in place; requests keep their keys and values.

        Raises:
            InfraError: nothing is staged, the staged version is older than the one in use, or the
                load failed. After a failed load the engine holds no version until one succeeds.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            raise InfraError("no version is staged", "stage one first")
        check_manifest(self._targets, staged.manifest, self._version)
        self._version = None
        self._client.swap(staged)
        self._version = staged.manifest.version

    def transfer(self, message: Message) -> concurrent.futures.Future[None]:
        """This engine's end of a direct transfer."""
        # It imports vLLM's transports, which a run without them does without.
        from raygrpo.engines.vllm.native import receive

        return receive(self._client, message)

    def hold(self, version: Version | None) -> None:
        """Says which version a direct transfer has left here; None while one is under way."""
        self._version = version

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Stages and commits a version."""
        self.stage_weights(manifest, buckets)
        self.commit_weights()

    def abort(self, stream: Stream, group_id: int) -> list[Completion]:
        """Drops a group; returns its completions so far, in order; none if it had not begun."""
        sent = self.admission.drop(stream, group_id)
        if sent is None:
            return []
        del self.admission.running[sent.serial]
        completions = self._client.call(self._abort(sent))
        return completions if any(c.token_ids.size for c in completions) else []

    async def _abort(self, sent: Sent) -> list[Completion]:
        sent.aborted = True
        await self._client.ask("abort", sent.names)  # the last outputs hold the tokens so far
        return await asyncio.wrap_future(sent.future)

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        """Logprobs [T] of each token given those before it, in nats; index 0 is 0."""
        ids = [int(token) for token in token_ids]
        found = self._client.call(self._client.score(ids, temperature, self._held()))
        return np.array([0.0, *found], np.float32)

    def sleep(self) -> None:
        """Gives up cache and weights (vLLM's level 2); the engine then holds no version.

        Without vLLM's ``enable_sleep_mode``, as on a CPU, nothing happens.
        """
        if self._can_sleep:
            self._version = None
            self._client.call(self._client.ask("sleep", level=2))

    def wake(self) -> None:
        """Takes the memory back; weights come with the next load."""
        if self._can_sleep:
            self._client.call(self._client.ask("wake_up"))

    def close(self) -> None:
        """Ends vLLM's processes; the engine cannot be used afterwards."""
        self.admission.clear()
        self._version = None
        self._staged = None
        self._client.close()


def _unwritten(version: Version) -> Completion:
    nothing = np.zeros(0, np.int32)
    return Completion(
        token_ids=nothing,
        logprobs=nothing.astype(np.float32),
        loss_mask=nothing.astype(np.bool_),
        text="",
        finish="abort",
        version_runs=((version, 0),),
    )
