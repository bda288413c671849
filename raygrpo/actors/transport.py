"""How weights travel in a run: the key ``weights.transport`` chooses both ends here, once."""

from __future__ import annotations

from raygrpo.actors.engine_thread import EngineThread
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.actors.weight_sync import Proof, StoreReceiver, StoreSender
from raygrpo.config import RunConfig
from raygrpo.engines.engine_weights import EngineWeights


def make_sender(config: RunConfig, store: StoreHandle, *, rank: int, local: bool) -> StoreSender:
    """A learner rank's end; ``local``: the whole run is on one machine.

    Raises:
        ConfigError: this process has no device for the transport.
    """
    if config.weights.transport == "store":
        return StoreSender(store, rank=rank, local=local, lora=bool(config.learner.lora))
    # It imports torch, and vLLM in rank 0.
    from raygrpo.actors.native_transfer import NativeSender

    return NativeSender(config, store, rank=rank, local=local)


def make_receiver(
    config: RunConfig,
    store: StoreHandle,
    weights: EngineWeights,
    thread: EngineThread,
    proof: Proof,
) -> StoreReceiver:
    """A generator's end."""
    if config.weights.transport == "store":
        return StoreReceiver(store, weights, thread, proof)
    # It imports torch.
    from raygrpo.actors.native_transfer import NativeReceiver

    return NativeReceiver(store, weights, thread, proof)


def publish_timeout_s(config: RunConfig) -> float:
    """The deadline of a publish: a direct transfer has its own deadline, before the store's."""
    num_syncs = 1 if config.weights.transport == "store" else 2
    return config.ray.timeouts_s.sync * num_syncs
