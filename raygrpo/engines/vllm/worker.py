"""The workers' side of weight updates in place: buckets in shared memory, loaded by vLLM's reload.

vLLM imports this module in each worker process (``worker_extension_cls``). The import registers the
transfer backend. vLLM's layerwise reload rebuilds each layer as from a checkpoint, packs the layer
for the kernels of this machine and copies it into the tensors in use. So a loaded version equals a
fresh start on this version.

vLLM's core and workers do not notice when the process that started them is killed. So a thread of
each worker waits for the end of this process, and then ends worker and core.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import threading
from dataclasses import dataclass
from itertools import chain
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

from raygrpo.errors import InfraError
from raygrpo.weights.buckets import unpack
from raygrpo.weights.shared import read_shared

BACKEND: Final = "raygrpo"
OWNER: Final = "RAYGRPO_VLLM_OWNER"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Empty: sender and workers agree on nothing beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """A version: pairs of `BucketSpec` and `SharedAddress`, pickled by our own process."""

    buckets: bytes


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """vLLM's weight-transfer interface over `raygrpo.weights.shared`."""

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
        buckets = pickle.loads(update_info.buckets)
        weights = chain.from_iterable(
            unpack(spec, read_shared(address)) for spec, address in buckets
        )
        self._missing -= set(self.model.load_weights(weights) or ())

    def finish_weight_update(self) -> None:
        """Packs and swaps in the layers that are still open.

        A head tied to the embedding shares the embedding's tensor. On a CPU it has a packed copy of
        its own, which the reload leaves out.

        Raises:
            InfraError: no published tensor came for some parameter.
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
    """Adds no methods to a worker: vLLM needs a class to import this module."""


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


# vLLM warns of each layer without weights at each update; `finish_weight_update` finds those that
# matter.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
for _kind, _name in {"nccl": "NcclEngine", "ipc": "IpcEngine"}.items():  # imported only if chosen
    _module = "raygrpo.engines.vllm.native_worker"
    WeightTransferEngineFactory.register_engine(f"{BACKEND}-{_kind}", _module, _name)
_watch_owner()
