"""vLLM's AsyncLLM on an event loop of its own thread, for callers without an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import os
import pickle
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from raygrpo.engines.vllm.requests import version_label
from raygrpo.engines.vllm.worker import OWNER
from raygrpo.errors import ConfigError, InfraError, infra_errors
from raygrpo.types import Version
from raygrpo.weights.shared import SharedBuffer
from raygrpo.weights.types import WeightsManifest

T = TypeVar("T")
START_TIMEOUT_S: Final = 1800.0
CALL_TIMEOUT_S: Final = 600.0
_LOOK_S: Final = 0.5
_CLOSE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class SharedVersion:
    """A whole version in shared memory, which goes when this value goes."""

    manifest: WeightsManifest
    buffers: Sequence[SharedBuffer]


class VllmClient:
    """Starts vLLM's processes, and hands work to the event loop that talks to them.

    Attributes:
        max_positions: tokens that a prompt and its completion may have together.

    Raises:
        ConfigError: vLLM does not start.
    """

    def __init__(self, arguments: AsyncEngineArgs) -> None:
        self._names = (f"score-{number}" for number in itertools.count())
        self._llm: AsyncLLM | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        os.environ[OWNER] = str(os.getpid())  # vLLM's processes end with this one
        try:
            self._llm = self.call(self._start(arguments), START_TIMEOUT_S)
        except (ValueError, RuntimeError, InfraError) as error:
            self.close()
            raise ConfigError(
                f"vLLM does not start: {error}",
                "see the generator's log; change generators.options, or set "
                "generators.engine: transformers",
            ) from error
        finally:
            del os.environ[OWNER]
        self.max_positions: int = self._llm.model_config.max_model_len

    async def _start(self, arguments: AsyncEngineArgs) -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(arguments)
        await llm.get_supported_tasks()  # cached, so that requests enter without a wait
        await llm.init_weight_transfer_engine(WeightTransferInitRequest())
        return llm

    @property
    def _open(self) -> AsyncLLM:
        if self._llm is None:
            raise InfraError("the engine is closed")
        return self._llm

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts work on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        """Runs work on the loop and waits for it.

        Raises:
            InfraError: vLLM died, or is silent for longer than ``timeout_s``.
        """
        future = self.begin(work)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.result(future, _LOOK_S)
            except TimeoutError:
                late = time.monotonic() > deadline
                if late or (self._llm is not None and self._llm.errored):
                    future.cancel()
                    what = f"did not answer within {timeout_s:.0f} s" if late else "died"
                    raise InfraError(f"vLLM {what}", "the generator is replaced") from None

    def result(self, future: concurrent.futures.Future[T], timeout_s: float | None = None) -> T:
        """The result of the work.

        Raises:
            InfraError: vLLM died.
        """
        with infra_errors("vLLM"):
            return future.result(timeout_s)

    async def generate(
        self, name: str, ids: list[int], params: SamplingParams, version: Version
    ) -> RequestOutput:
        """A request's last output. Cached prompts are shared within ``version`` only."""
        prompt = tokens_input(ids, cache_salt=version_label(version))
        last = None
        async for output in self._open.generate(prompt, params, name):
            last = output
        assert last is not None
        return last

    async def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of AsyncLLM."""
        return await getattr(self._open, method)(*arguments, **options)

    def swap(self, staged: SharedVersion) -> None:
        """Loads a version in place, between two steps of vLLM; requests in flight go on with it.

        Raises:
            InfraError: vLLM died, or could not load the version.
        """
        # The error of a worker comes as a bare Exception.
        what, fix = f"loading version {staged.manifest.version}", "the generator is replaced"
        with infra_errors(what, all_errors=True, fix=fix):
            self.call(self._swap(staged))

    async def _swap(self, staged: SharedVersion) -> None:
        addresses = [buffer.show() for buffer in staged.buffers]
        pairs = list(zip(staged.manifest.buckets, addresses, strict=True))
        info = {"buckets": pickle.dumps(pairs)}
        llm = self._open
        await llm.pause_generation(mode="keep", clear_cache=False)
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info=info))
        await llm.finish_weight_update(version_label(staged.manifest.version))
        await llm.resume_generation()

    async def score(self, ids: list[int], temperature: float, version: Version) -> list[float]:
        """Logprobs of ``ids[1:]``, each given the ids before it.

        vLLM scores a prompt at temperature 1 only. At another temperature each token is a request
        of its own: the next token after all ids before it.
        """
        if temperature != 1:
            ends = range(1, len(ids))
            scores = (self._score_next(ids, end, temperature, version) for end in ends)
            return await asyncio.gather(*scores)
        params = SamplingParams(prompt_logprobs=0, **_ONE_TOKEN)
        output = await self.generate(next(self._names), ids, params, version)
        found = output.prompt_logprobs or []
        return [
            position[token].logprob
            for token, position in zip(ids[1:], found[1:], strict=True)
            if position is not None
        ]

    async def _score_next(
        self, ids: list[int], end: int, temperature: float, version: Version
    ) -> float:
        params = SamplingParams(
            temperature=temperature, seed=0, logprob_token_ids=[ids[end]], **_ONE_TOKEN
        )
        output = await self.generate(next(self._names), ids[:end], params, version)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        score: float = logprobs[0][ids[end]].logprob
        return score

    def close(self) -> None:
        """Ends vLLM's processes and the thread."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
        self.begin(_cancel_others()).result(_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


_ONE_TOKEN: dict[str, Any] = {
    "max_tokens": 1,
    "detokenize": False,
    "output_kind": RequestOutputKind.FINAL_ONLY,
}


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
