"""The worker's side of weight updates in place: buckets in shared memory, loaded by vLLM's reload.

vLLM imports this module in each worker process (``worker_extension_cls``), which registers the
transfer backend there. The layerwise reload rebuilds each layer as from a checkpoint, packs it as
the kernels of this machine want it and copies it into the tensors in use, so that a loaded version
equals a fresh start on it.

Neither vLLM's core nor its workers notice when the process that started them is killed: a thread
of each worker waits for that and ends worker and core.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import threading
from dataclasses import dataclass
from typing import Final

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from raygrpo.engines.vllm.shared_memory import read_buckets
from raygrpo.errors import InfraError

BACKEND: Final = "raygrpo"
OWNER: Final = "RAYGRPO_VLLM_OWNER"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Where a version is: ``specs`` are its pickled `BucketSpec`s (by our own process)."""

    path: str
    specs: bytes


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """vLLM's weight-transfer interface over `raygrpo.engines.vllm.shared_memory`."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Puts the model back into the form in which checkpoints are loaded."""
        initialize_layerwise_reload(self.model)
        self._missing = {name for name, _ in self.model.named_parameters()}

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Loads a whole version, verified bucket by bucket."""
        weights = read_buckets(update_info.path, pickle.loads(update_info.specs))
        self._missing -= set(self.model.load_weights(weights) or ())

    def finish_weight_update(self) -> None:
        """Packs and swaps in what is still open.

        A head that is tied to the embedding has its tensor, but a packed copy of its own on CPU,
        which the reload leaves as it was.

        Raises:
            InfraError: parameters that no published tensor went into.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        own = {name for name, _ in self.model.named_parameters()}
        if missing := sorted(self._missing & own):
            raise InfraError(f"no weights came for {missing}")
        for name in self._missing:
            tied = self.model.get_submodule(name.rpartition(".")[0])
            tied.quant_method.process_weights_after_loading(tied)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class WorkerExtension:
    """What a worker process gets beside vLLM's own methods: nothing; its module is the point."""


def end_with(owner: int, parent: int) -> None:
    """Waits for the end of the process ``owner``; then ends this one and its ``parent``."""
    try:
        descriptor = os.pidfd_open(owner)
        select.select([descriptor], [], [])
    except ProcessLookupError:  # it has ended already
        pass
    if parent != owner:
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch_owner() -> None:
    owner = int(os.environ.get(OWNER, os.getpid()))
    if owner != os.getpid():  # else this is the engine's own process
        arguments = (owner, os.getppid())
        threading.Thread(target=end_with, args=arguments, name="owner", daemon=True).start()


# It warns of each layer without weights at each update; `finish_weight_update` knows which matter.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
for _kind, _name in {"nccl": "NcclEngine", "ipc": "IpcEngine"}.items():  # imported where wanted
    _module = "raygrpo.engines.vllm.native_worker"
    WeightTransferEngineFactory.register_engine(f"{BACKEND}-{_kind}", _module, _name)
_watch_owner()
