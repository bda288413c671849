"""The worker's half of `raygrpo.engines.vllm.native`. NO GPU HAS RUN IT YET.

vLLM's own transfer engines work inside ours for shared memory, so that a worker takes versions from
the learner and from the store.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any, ClassVar, Final

from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from raygrpo.engines.vllm.worker import (
    SharedMemoryEngine,
    SharedMemoryInitInfo,
    SharedMemoryUpdateInfo,
)

NATIVE: Final = "native"  # of an update that is not in shared memory; pickled by our own process


class _Loader:
    """Stands for the model in vLLM's engines, and notes which parameters came."""

    def __init__(self, model: Any, missing: set[str]) -> None:
        self._model, self._missing = model, missing

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._missing -= set(self._model.load_weights(weights) or ())


class NcclEngine(SharedMemoryEngine):
    """The worker's end: vLLM's NCCL engine, and our own for versions from the store."""

    native: ClassVar[Any] = NCCLWeightTransferEngine

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._native = self.native(*arguments)

    def parse_init_info(self, init_dict: dict[str, Any]) -> WeightTransferInitInfo:
        """Empty information comes from our own client, other from a group."""
        if init_dict:
            return self._native.parse_init_info(init_dict)
        return super().parse_init_info(init_dict)

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Leaves the group before and enters the new one."""
        if not isinstance(init_info, SharedMemoryInitInfo):
            self._native.shutdown()
            self._native.init_transfer_engine(init_info)

    def parse_update_info(self, update_dict: dict[str, Any]) -> WeightTransferUpdateInfo:
        """A bucket from the learner, or a version in shared memory."""
        if NATIVE in update_dict:
            return self._native.parse_update_info(pickle.loads(update_dict[NATIVE]))
        return super().parse_update_info(update_dict)

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:
        """Loads a bucket, or a whole version."""
        if isinstance(update_info, SharedMemoryUpdateInfo):
            super().receive_weights(update_info)
            return
        self._native.model = _Loader(self.model, self._missing)
        self._native.receive_weights(update_info)

    def shutdown(self) -> None:
        """Leaves the group."""
        self._native.shutdown()


class IpcEngine(NcclEngine):
    """The same for CUDA IPC."""

    native = IPCWeightTransferEngine
