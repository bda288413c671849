"""Native transports in vLLM's own code, with threads in the place of NCCL and of CUDA's handles.

What runs is ours and vLLM's: both ends' arguments, packing, ranks, loading. What does not run here
is what needs a GPU: communicators, streams, exported memory.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions
from vllm.distributed.weight_transfer import nccl_common, packed_tensor
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.v1.engine.async_llm import AsyncLLM

from raygrpo.config import ModelSection, Transport
from raygrpo.engines.vllm import native as vllm_native
from raygrpo.engines.vllm import worker as vllm_weights
from raygrpo.engines.vllm.native import IpcSender, NcclSender, gpu_buckets, receive
from raygrpo.engines.vllm.native_worker import IpcEngine, NcclEngine
from raygrpo.engines.vllm.requests import engine_arguments
from raygrpo.errors import InfraError
from raygrpo.weights.buckets import make_buckets
from raygrpo.weights.native import Message, NativeTransfer, Sender
from raygrpo.weights.shared import share
from tests.vllm.engines import ECHO
from tests.weights.test_native import Group, manifest

pytestmark = pytest.mark.filterwarnings("ignore")
UUID = "GPU-0"
TIMEOUT_S = 60.0


class Communicator:
    disabled = False

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank = group, rank
        group.ranks.add(rank)
        group.enter()

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        (sent,) = self.group.broadcast([tensor] if self.rank == src else None)
        tensor.copy_(sent)  # fails where the two sides packed in different ways

    def destroy(self) -> None:
        self.group.barrier.abort()


class Model(torch.nn.Module):
    """Two dtypes, a scalar and an empty row; loads what it is given by name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(3, 5, generator=draw).bfloat16())
        self.b = torch.nn.Parameter(torch.randn(7, generator=draw))
        self.c = torch.nn.Parameter(torch.randn((), generator=draw).bfloat16())

    def load_weights(self, weights: Any) -> set[str]:
        own, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            loaded.add(name)
        return loaded


class Client:
    """`VllmClient` with one worker, whose engine for weights gets what vLLM's worker would."""

    def __init__(self, kind: type[NcclEngine], rank: int = 0) -> None:
        self.model = Model(seed=0)
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=rank)
        config = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.engine = kind(None, config, torch.device("cpu"), self.model)
        self.version = ""
        self.paused: list[str] = []
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def receive(self, message: Message) -> Future[None]:
        return receive(self, message)  # type: ignore[arg-type]

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def ask(self, method: str, *arguments: Any, **options: Any) -> None:
        inspect.signature(getattr(AsyncLLM, method)).bind(None, *arguments, **options)
        await asyncio.to_thread(getattr(self, method), *arguments)

    def init_weight_transfer_engine(self, request: Any) -> None:
        self.engine.init_transfer_engine(self.engine.parse_init_info(request.init_info))

    def pause_generation(self) -> None:
        self.paused.append("pause")

    def resume_generation(self) -> None:
        self.paused.append("resume")

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()

    def update_weights(self, request: Any) -> None:
        self.engine.update_weights(request.update_info)

    def finish_weight_update(self, version: str) -> None:
        self.engine.finish_weight_update()
        self.version = version


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int, Group]:
    """Takes the place of what a GPU does; the groups that were made, by port."""
    groups: dict[int, Group] = {}
    exported: dict[str, Tensor] = {}
    stream = SimpleNamespace(synchronize=lambda: None)

    def make_group(host: str, port: int, rank: int, world_size: int, device: Any) -> Communicator:
        assert host == "127.0.0.1"
        return Communicator(groups.setdefault(port, Group(world_size)), rank)

    def export(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
        exported[name := f"buffer-{len(exported)}"] = tensor
        return None, (name, *[0] * 6)

    monkeypatch.setattr(nccl_common, "stateless_init_process_group", make_group)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda index, count: (stream,) * count)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(vllm_native, "_export", export)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda name, *_: exported[name])
    props = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: props)
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(vllm_weights, name, lambda *_: None)
    return groups


def ends(kind: str) -> tuple[Sender, type[NcclEngine]]:
    if kind == "nccl":
        return NcclSender("127.0.0.1", None), NcclEngine
    return IpcSender(None, UUID), IpcEngine


def buckets(model: Model) -> Iterator[list[tuple[str, Tensor]]]:
    return gpu_buckets(model.named_parameters(), "cpu")


def same(left: Model, right: Model) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_versions_arrive_bit_for_bit_whoever_takes_part(kind: str) -> None:
    sender, engine = ends(kind)
    clients = {name: Client(engine) for name in "abc"}
    transfer = NativeTransfer(sender, TIMEOUT_S)
    for step, names in enumerate(["ab", "ab", "c", "abc"]):
        receivers = {name: clients[name].receive for name in names}
        trained = Model(seed=step + 1)
        assert not transfer.sync(manifest(step), buckets(trained), receivers)
        for name in names:
            assert same(clients[name].model, trained)
            assert clients[name].version == f"1.{step}"
            assert clients[name].paused[-2:] == ["pause", "resume"]
    transfer.close()


def test_ranks_follow_the_sender_and_count_the_workers_of_an_engine(
    no_gpu: dict[int, Group],
) -> None:
    """Two engines of two workers: vLLM adds each worker's own rank."""

    class Both(Client):
        def __init__(self) -> None:
            super().__init__(NcclEngine)
            self.workers = [Client(NcclEngine, rank) for rank in (0, 1)]

        async def ask(self, method: str, *arguments: Any, **options: Any) -> None:
            await asyncio.gather(*(c.ask(method, *arguments, **options) for c in self.workers))

    engines, trained = {"a": Both(), "b": Both()}, Model(seed=1)
    receivers = {name: engine.receive for name, engine in engines.items()}
    transfer = NativeTransfer(NcclSender("127.0.0.1", None), TIMEOUT_S, num_workers=2)
    assert not transfer.sync(manifest(1), buckets(trained), receivers)
    (group,) = no_gpu.values()
    assert group.ranks == {0, 1, 2, 3, 4}
    assert all(same(w.model, trained) for engine in engines.values() for w in engine.workers)
    transfer.close()


def test_a_broadcast_that_nobody_answers_is_aborted(no_gpu: dict[int, Group]) -> None:
    class Deaf(Client):
        def update_weights(self, request: Any) -> None:
            threading.Event().wait(TIMEOUT_S)

    transfer = NativeTransfer(NcclSender("127.0.0.1", None), timeout_s=0.5)
    receivers = {"deaf": Deaf(NcclEngine).receive}
    assert set(transfer.sync(manifest(1), buckets(Model(seed=1)), receivers)) == {"deaf"}
    (group,) = no_gpu.values()
    assert group.barrier.broken  # where NCCL's abort would have freed the GPU


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_a_parameter_that_nothing_came_for_fails_the_update(kind: str) -> None:
    sender, engine = ends(kind)
    some = [pair for pair in Model(seed=1).named_parameters() if pair[0] != "b"]
    transfer = NativeTransfer(sender, TIMEOUT_S)
    broken = transfer.sync(manifest(1), gpu_buckets(some, "cpu"), {"a": Client(engine).receive})
    assert "no weights came for ['b']" in broken["a"]


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_store_stays_open_to_a_worker_that_could_take_more(spoilt: bool) -> None:
    """A version in shared memory, whose bytes the worker verifies."""
    client, trained = Client(NcclEngine), Model(seed=1)
    client.engine.init_transfer_engine(client.engine.parse_init_info({}))  # as the client's start
    specs, arrays = zip(*make_buckets(trained.named_parameters()), strict=True)
    buffers = [share(data) for data in arrays]
    if spoilt:
        buffers[0].data[0] ^= 1
    pairs = [(spec, buffer.show()) for spec, buffer in zip(specs, buffers, strict=True)]
    client.engine.start_weight_update()
    update = {"buckets": pickle.dumps(pairs)}
    if spoilt:
        with pytest.raises(InfraError, match="corrupt"):
            client.engine.update_weights(update)
        return
    client.engine.update_weights(update)
    client.engine.finish_weight_update()
    assert same(client.model, trained)


def test_the_transport_chooses_the_workers_engine() -> None:
    model = ModelSection(path=str(ECHO), random_init=True)
    engines: dict[Transport, type] = {"nccl": NcclEngine, "ipc": IpcEngine}
    for kind, engine in engines.items():
        arguments = engine_arguments(
            model, seed=0, max_rows=1, device="cpu", options={}, transport=kind
        )
        backend = arguments.weight_transfer_config.backend
        assert WeightTransferEngineFactory._registry[backend]() is engine


def test_an_nccl_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's communicator is then silently without effect."""
    monkeypatch.setattr(Communicator, "disabled", True)
    _, meet = NcclSender("127.0.0.1", None).open(1)
    with pytest.raises(InfraError, match="NCCL does not load"):
        meet()


def test_buckets_have_one_dtype_and_are_copies() -> None:
    model = Model(seed=1)
    found = list(buckets(model))
    assert [[name for name, _ in bucket] for bucket in found] == [["a"], ["b"], ["c"]]
    before = found[0][0][1].clone()
    model.a.data.zero_()
    assert torch.equal(found[0][0][1], before)
