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
from functools import partial
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
from raygrpo.weights.native import Begin, Finish, Join, Message, Named, Offer, Receive, Sender

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

    def __init__(self, address: Mapping[str, Any], device: int | None) -> None:
        self._address, self._device = address, device
        self._communicator: Any = None
        self._closed = False

    def meet(self) -> None:
        """Waits for the workers.

        Raises:
            InfraError: there is no NCCL here.
        """
        with torch.accelerator.device_index(self._device):
            self._communicator = trainer_init(self._address)
        if self._communicator.disabled:
            raise InfraError("NCCL does not load in the learner")
        if self._closed:
            self._communicator.destroy()

    def broadcast(self, bucket: list[Named]) -> None:
        """Sends a bucket and waits until it is sent."""
        with torch.accelerator.device_index(self._device):
            packed_nccl_broadcast_producer(
                iterator=iter(bucket), group=self._communicator, src=0, post_iter_func=itemgetter(1)
            )

    def close(self) -> None:
        self._closed = True
        if self._communicator is not None:
            self._communicator.destroy()  # aborts, on a thread, and waits for 5 s at most


class NcclSender:
    """Rank 0 of vLLM's NCCL broadcasts; a bucket travels as one packed tensor."""

    def __init__(self, host: str, device: int | None) -> None:
        self._host, self._device = host, device
        self._group: _Group | None = None

    def open(self, world_size: int) -> Offer:
        """Chooses where to meet."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        address = {"master_address": self._host, "master_port": port, "world_size": world_size}
        self._group = _Group(address, self._device)
        return {**address, "packed": True}, self._group.meet

    def offer(self, bucket: list[Named]) -> Offer:
        """Waits for the bucket's own kernels, since vLLM packs it on another stream."""
        assert self._group is not None, "no group is open"
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        return _describe(bucket), partial(self._group.broadcast, bucket)

    def close(self) -> None:
        """Aborts a broadcast on the GPU, which would wait for ever."""
        if self._group is not None:
            self._group.close()


class IpcSender:
    """Shows buckets in one buffer on the GPU that learner and generators share.

    The buffer is exported once. Workers keep it mapped, and read a bucket before they answer.
    """

    def __init__(self, device: int | None, gpu_uuid: str) -> None:
        self._device, self._gpu_uuid = device, gpu_uuid
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._handle: Any = None

    def open(self, world_size: int) -> Offer:
        """Nobody meets."""
        return {"packed": True}, _nothing

    def offer(self, bucket: list[Named]) -> Offer:
        """Copies a bucket into the buffer, where workers read it themselves."""
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
        return {**_describe(bucket), "ipc_handles": handles, "tensor_sizes": sizes}, _nothing

    def close(self) -> None:
        """Nobody waits for anything."""


def _nothing() -> None:
    """The sender's part where the receivers do all."""


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


def receive(client: VllmClient, message: Message) -> Future[None]:
    """A `raygrpo.weights.native.Receiver`, once the engine's client is given."""
    return client.begin(_receive(client, message))


async def _receive(client: VllmClient, message: Message) -> None:
    match message:
        case Join(init_info):
            info = dict(init_info)
            if "world_size" not in info:
                del info["rank_offset"]  # IPC knows no ranks
            request = WeightTransferInitRequest(init_info=info)
            await client.ask("init_weight_transfer_engine", request)
        case Begin():  # running requests keep the keys and values that they have
            await client.ask("pause_generation", mode="keep", clear_cache=False)
            await client.ask("start_weight_update")
        case Receive(update_info):  # pickled, since vLLM's messages carry no CUDA handles
            info = {NATIVE: pickle.dumps(dict(update_info))}
            await client.ask("update_weights", WeightTransferUpdateRequest(update_info=info))
        case Finish(manifest):
            await client.ask("finish_weight_update", version_label(manifest.version))
            await client.ask("resume_generation")
