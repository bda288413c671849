"""The learner: one actor per rank, and the driver's face of all of them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from raygrpo.actors.cluster.placement import labels_of
from raygrpo.actors.cluster.site import Site
from raygrpo.actors.futures import Pending
from raygrpo.actors.process import keep_heap, log_path, log_to, spawn
from raygrpo.actors.profiling import ProfileRequest, Tracer
from raygrpo.actors.transport import make_sender, publish_timeout_s
from raygrpo.actors.weight_store import StoreHandle
from raygrpo.actors.weight_sync import StoreSender
from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from raygrpo.types import Group, Microbatch, StepBatch, StepResult, Version, merge_stats
from raygrpo.weights.types import PublishReport


class LearnerActor:
    """One DeepSpeed rank. Calls run one at a time, in the order in which the driver makes them."""

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        store: StoreHandle | None,
        local: bool,
        profile: ProfileRequest | None = None,
    ) -> None:
        self._config, self._rank = config, rank
        self._store, self._local = store, local
        self._profile = profile
        self._sender: StoreSender | None = None

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it, for the ranks to meet.

        Raises:
            ConfigError: this node does not see the run's directory, where checkpoints go.
        """
        if not Path(self._config.run_dir).is_dir():
            raise ConfigError(
                f"the learner's node {socket.gethostname()} does not see run_dir "
                f"{self._config.run_dir}",
                "put it on storage that the driver's and the learner's nodes share",
            )
        return ray.util.get_node_ip_address(), _free_port()

    def start(self, host: str, port: int, local_rank: int, threads: int, log: str | None) -> int:
        """Builds the rank's model and optimizer, with all other ranks; returns its process id."""
        log_to(log)
        if not self._config.ray.gpus.learner:
            keep_heap()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        from raygrpo.learner.deepspeed_learner import DeepSpeedLearner

        torch.set_num_threads(threads)
        self._learner = DeepSpeedLearner(
            self._config,
            rank=self._rank,
            master_addr=host,
            master_port=port,
            local_rank=local_rank,
            device="cuda" if self._config.ray.gpus.learner else "cpu",
        )
        if self._store is not None:
            self._sender = make_sender(
                self._config, self._store, rank=self._rank, local=self._local
            )
        return os.getpid()

    def update(self, batch: StepBatch, incarnation: int) -> StepResult:
        """Trains this rank's share of a step."""
        if self._profile is None or batch.step + 1 != self._profile.step:
            return self._update(batch, incarnation)
        with Tracer(self._profile, f"learner-{self._rank}"):
            return self._update(batch, incarnation)

    def _update(self, batch: StepBatch, incarnation: int) -> StepResult:
        started = time.monotonic()
        if batch.has_signal or not self._may_skip:
            stats = self._learner.update(self._microbatches(batch))
        else:
            stats = self._learner.update((), skip=True)
        return StepResult(
            version=Version(incarnation, batch.step + 1),
            stats=stats,
            seconds=time.monotonic() - started,
        )

    def publish(self, version: Version, generators: Mapping[str, Any]) -> PublishReport | None:
        """Publishes the weights; rank 0 sends, the others help to gather.

        ``generators`` are ready to take the version directly, if the transport does so.
        """
        # It imports torch, which the driver does without.
        from raygrpo.learner.probe import score_probe

        assert self._sender is not None, "a learner without a store publishes nothing"
        probe = score_probe(self._learner)
        return self._sender.publish(version, self._learner, probe, generators)

    def save(self, directory: str) -> None:
        """Saves this rank's state under ``learner/``; rank 0 adds the model under ``model/``.

        With LoRA that is the merged model, and ``adapter/`` is the adapter in peft's format.
        """
        from raygrpo.learner.lora import write_adapter
        from raygrpo.weights.export import write_model

        path = Path(directory)
        self._learner.save(path / "learner")
        adapter = dict(self._learner.adapter_weights())
        if adapter and not self._rank:
            write_adapter(path / "adapter", adapter, self._config)
        tensors = self._learner.named_weights()
        if self._rank:
            for _ in tensors:
                pass
            return
        write_model(path / "model", tensors, self._learner.hf_model, self._config.model)

    def load(self, directory: str) -> None:
        """Takes up the state that `save` wrote."""
        self._learner.load(Path(directory) / "learner")

    def _microbatches(self, batch: StepBatch) -> list[list[Microbatch]]:
        learner = self._learner
        share, num_shares = learner.data_share
        plans = place(
            batch,
            num_shares,
            tokens_per_microbatch=self._config.train.tokens_per_microbatch,
            layout=learner.layout,
            hidden_size=learner.hf_model.config.get_text_config().hidden_size,
        )[share]
        needed = {s.group_id for plan in plans for rows in plan for row in rows for s in row}
        groups = self._fetch(batch.payloads, sorted(needed))
        return [[make_microbatch(rows, groups) for rows in plan] for plan in plans]

    def _fetch(self, payloads: Mapping[int, Any], group_ids: Sequence[int]) -> dict[int, Group]:
        timeout = self._config.ray.timeouts_s.update
        groups = ray.get([payloads[group_id] for group_id in group_ids], timeout=timeout)
        return dict(zip(group_ids, groups, strict=True))

    @property
    def _may_skip(self) -> bool:
        return self._config.train.dynamic_sampling and not self._config.loss.acts_without_signal


class LearnerGroup:
    """All ranks behind one face; each method starts a call and returns its `Pending` result."""

    def __init__(self, config: RunConfig, store: StoreHandle | None, site: Site) -> None:
        """``config`` is a resolved configuration."""
        self._config = config
        self._local, self._logs = site.local, site.logs
        self._threads = config.ray.threads.learner
        gpus, labels = config.ray.gpus.learner, labels_of(config, "learner")
        self._actors = [
            spawn(
                LearnerActor,
                config,
                rank,
                store,
                site.local,
                site.profile if rank == 0 else None,
                **site.options(rank, threads=self._threads, gpus=gpus, labels=labels),
            )
            for rank in range(config.learner.num_ranks)
        ]

    def start(self) -> Pending[list[int]]:
        """Joins the ranks into one process group and builds their models."""
        timeout = self._config.ray.timeouts_s.start
        addresses = self._find_addresses(timeout)
        hosts = [host for host, _ in addresses]
        one_host = len(set(hosts)) == 1
        master = "127.0.0.1" if one_host else hosts[0]
        refs = []
        for rank, actor in enumerate(self._actors):
            # A GPU rank sees only its own devices, so the first is always its own.
            on_gpu = self._config.ray.gpus.learner > 0
            local_rank = 0 if on_gpu else hosts[:rank].count(hosts[rank])
            log = log_path(self._logs, f"learner-{rank}")
            refs.append(actor.start.remote(master, addresses[0][1], local_rank, self._threads, log))
        return Pending("learner (start)", refs, timeout, list)

    def _find_addresses(self, timeout_s: float) -> list[tuple[str, int]]:
        """Each rank's host and a port free there; on a local cluster, without asking the ranks."""
        if self._local:
            return [("127.0.0.1", _free_port())] * len(self._actors)
        refs = [actor.address.remote() for actor in self._actors]
        return Pending("learner (start)", refs, timeout_s, list).wait()

    def update(self, batch: StepBatch, incarnation: int) -> Pending[StepResult]:
        """Trains one step on all ranks."""
        refs = [actor.update.remote(batch, incarnation) for actor in self._actors]
        return self._pending("learner (update)", refs, _merge_results)

    def publish(self, version: Version, generators: Mapping[str, Any]) -> Pending[PublishReport]:
        """Publishes the weights as ``version``; ``generators`` are ready to take them directly."""
        refs = [actor.publish.remote(version, generators) for actor in self._actors]
        timeout_s = publish_timeout_s(self._config)
        return Pending("learner (publish)", refs, timeout_s, lambda reports: reports[0])

    def save(self, directory: Path) -> Pending[None]:
        """Saves learner state and model into a directory that all ranks see."""
        refs = [actor.save.remote(str(directory)) for actor in self._actors]
        return self._pending("learner (save)", refs, lambda _: None)

    def load(self, directory: Path) -> Pending[None]:
        """Takes up a saved state."""
        refs = [actor.load.remote(str(directory)) for actor in self._actors]
        return self._pending("learner (load)", refs, lambda _: None)

    def close(self) -> None:
        """Ends all ranks."""
        for actor in self._actors:
            ray.kill(actor)

    def _pending(self, name: str, refs: list[Any], combine: Any) -> Pending[Any]:
        return Pending(name, refs, self._config.ray.timeouts_s.update, combine)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def _merge_results(results: list[StepResult]) -> StepResult:
    return StepResult(
        version=results[0].version,
        stats=merge_stats([result.stats for result in results]),
        seconds=max(result.seconds for result in results),
    )
