"""Weights straight from the learner's GPU into vLLM's workers: its `nccl` and `ipc` backends.

NO GPU HAS RUN THIS YET. The module is written against vLLM 0.32 (vllm/distributed/weight_transfer).
Tests run vLLM's own classes, with a communicator of threads in place of NCCL.
`raygrpo.weights.native` has the protocol around the collectives.

The trainer's half of vLLM's engines sends to a fixed group, in one call without a deadline. So the
senders here use its parts. `raygrpo.engines.vllm.native_worker` is the workers' half.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from operator import itemgetter
from typing import Any, Final

import torch
from torch.multiprocessing.reductions import reduce_tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.nccl_common import trainer_init
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

from raygrpo.engines.vllm.client import VllmClient
from raygrpo.engines.vllm.native_worker import NATIVE
from raygrpo.engines.vllm.requests import version_label
from raygrpo.errors import ConfigError, InfraError
from raygrpo.types import Version
from raygrpo.weights.native import Named, Sender

BUCKET_BYTES: Final = 64 * 2**20
_export: Any = reduce_tensor


def make_sender(kind: str, host: str) -> Sender:
    """The learner's end; ``host`` is where receivers of ``nccl`` reach this process.

    Raises:
        ConfigError: this process has no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"weights.transport is {kind}, but the learner has no CUDA device",
            "set weights.transport: store",
        )
    device = torch.accelerator.current_device_index()
    if kind == "nccl":
        return NcclSender(host, device)
    return IpcSender(device, str(torch.cuda.get_device_properties(device).uuid))


class _Group:
    """One NCCL group, from its address on; it may be given up while it is still being made."""

    def __init__(self, address: dict[str, Any]) -> None:
        self.address = address
        self.communicator: Any = None
        self._closed = False

    def connect(self) -> None:
        self.communicator = trainer_init(self.address)
        if self.communicator.disabled:
            raise InfraError("NCCL does not load in the learner")
        if self._closed:
            self.communicator.destroy()

    def close(self) -> None:
        self._closed = True
        if self.communicator is not None:
            self.communicator.destroy()  # aborts, on a thread, and waits for 5 s at most


class NcclSender:
    """Rank 0 of vLLM's NCCL broadcasts; a bucket travels as one packed tensor."""

    def __init__(self, host: str, device: int | None) -> None:
        self._host, self._device = host, device
        self._group = _Group({})
        self._bucket: list[Named] = []

    def open(self, world_size: int) -> dict[str, Any]:
        """Chooses where to meet."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        self._group = _Group(
            {"master_address": self._host, "master_port": port, "world_size": world_size}
        )
        return {**self._group.address, "packed": True}

    def connect(self) -> None:
        """Meets the workers.

        Raises:
            InfraError: there is no NCCL here.
        """
        with torch.accelerator.device_index(self._device):
            self._group.connect()

    def offer(self, bucket: list[Named]) -> dict[str, Any]:
        """Waits for the bucket's own kernels, since vLLM packs it on another stream."""
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        self._bucket = bucket
        return _describe(bucket)

    def transmit(self) -> None:
        """Broadcasts the bucket and waits until it is sent."""
        with torch.accelerator.device_index(self._device):
            packed_nccl_broadcast_producer(
                iterator=iter(self._bucket),
                group=self._group.communicator,
                src=0,
                post_iter_func=itemgetter(1),
            )

    def close(self) -> None:
        """Aborts a broadcast on the GPU, which would wait for ever."""
        self._group.close()


class IpcSender:
    """Shows buckets in one buffer on the GPU that learner and generators share.

    The buffer is exported once. Workers keep it mapped, and read a bucket before they answer.
    """

    def __init__(self, device: int | None, gpu_uuid: str) -> None:
        self._device, self._gpu_uuid = device, gpu_uuid
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._handle: Any = None

    def open(self, world_size: int) -> dict[str, Any]:
        """Nothing to meet for."""
        return {"packed": True}

    def connect(self) -> None:
        """Nobody is waited for."""

    def offer(self, bucket: list[Named]) -> dict[str, Any]:
        """Copies a bucket into the buffer."""
        flat = [tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]
        sizes = [tensor.numel() for tensor in flat]
        if sum(sizes) > self._buffer.numel():
            device = flat[0].device
            room = max(sum(sizes), BUCKET_BYTES)
            self._buffer = torch.empty(room, dtype=torch.uint8, device=device)
            self._handle = _export(self._buffer)[1]
        torch.cat(flat, out=self._buffer[: sum(sizes)])
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        handles = {self._gpu_uuid: self._handle}
        return {**_describe(bucket), "ipc_handles": handles, "tensor_sizes": sizes}

    def transmit(self) -> None:
        """Nothing to do: workers read it themselves."""

    def close(self) -> None:
        """Nobody waits for anything."""


def _describe(bucket: list[Named]) -> dict[str, Any]:
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def gpu_buckets(tensors: Iterable[Named], device: str = "cuda") -> Iterator[list[Named]]:
    """Copies of tensors on ``device``, in buckets of about 64 MiB and of one dtype each.

    vLLM aligns a packed tensor by its dtype. A copy is needed: ZeRO-3 frees a gathered tensor.
    """
    bucket: list[Named] = []
    size = 0
    for name, tensor in tensors:
        full = size + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().to(device, copy=True)))
        size += tensor.nbytes
    if bucket:
        yield bucket


class VllmReceiver:
    """The `raygrpo.weights.native.Receiver` of the engine that ``client`` drives."""

    def __init__(self, client: VllmClient, num_workers: int) -> None:
        self._client, self.num_workers = client, num_workers

    def join(self, init_info: Mapping[str, Any]) -> Future[None]:
        """vLLM's ``init_weight_transfer_engine``."""
        info = dict(init_info)
        if "world_size" not in info:
            del info["rank_offset"]  # IPC knows no ranks
        request = WeightTransferInitRequest(init_info=info)
        return self._client.begin(self._client.ask("init_weight_transfer_engine", request))

    def begin(self) -> Future[None]:
        """Pauses decoding; requests keep the keys and values that they have."""
        return self._client.begin(self._begin())

    async def _begin(self) -> None:
        await self._client.ask("pause_generation", mode="keep", clear_cache=False)
        await self._client.ask("start_weight_update")

    def receive(self, update_info: Mapping[str, Any]) -> Future[None]:
        """vLLM's ``update_weights``; pickled, since vLLM's messages carry no CUDA handles."""
        info = {NATIVE: pickle.dumps(dict(update_info))}
        request = WeightTransferUpdateRequest(update_info=info)
        return self._client.begin(self._client.ask("update_weights", request))

    def finish(self, version: Version) -> Future[None]:
        """Names the version, and goes on decoding."""
        return self._client.begin(self._finish(version))

    async def _finish(self, version: Version) -> None:
        await self._client.ask("finish_weight_update", version_label(version))
        await self._client.ask("resume_generation")
