"""The one place where a driver joins a Ray cluster, or starts a local one of its own."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import ray

from raygrpo.actors.placement import Demand
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, InfraError


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A joined cluster. On a ``local`` one, actors reserve no CPUs: it is ours alone.

    ``ours`` is False where the caller had joined already: then the caller leaves it, too.
    """

    local: bool
    ours: bool


def connect(config: RunConfig, demand: Demand) -> Connection:
    """Joins the cluster that the configuration names and checks that the run fits.

    Raises:
        ConfigError: more GPUs are asked for than the cluster has or can scale to.
        InfraError: no cluster answers at the address.
    """
    address = config.ray.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "local")
    if ray.is_initialized():
        connection = Connection(local=False, ours=False)
    elif address == "local":
        _start_local(demand)
        connection = Connection(local=True, ours=True)
    else:
        _join(address)
        connection = Connection(local=False, ours=True)
    try:
        _check_gpus(demand)
    except ConfigError:
        disconnect(connection)
        raise
    return connection


def _start_local(demand: Demand) -> None:
    # Ray's own default protects a local cluster by a token. Its mode is read when ray is imported,
    # so setting it here would make this process a stranger to its own cluster.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            num_cpus=max(os.cpu_count() or 1, demand.num_processes),
        )
    except (ConnectionError, RuntimeError, OSError) as error:
        raise InfraError(
            f"Ray does not start here: {error}", "see the newest session under /tmp/ray"
        ) from None


def _join(address: str) -> None:
    try:
        ray.init(
            address=address,
            logging_level=logging.WARNING,
            log_to_driver=False,
            ignore_reinit_error=True,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InfraError(
            f"no Ray cluster answers at {address!r}: {error}",
            "check ray.address (or RAY_ADDRESS), and RAY_AUTH_TOKEN where the cluster has one",
        ) from None


def _check_gpus(demand: Demand) -> None:
    available = ray.cluster_resources().get("GPU", 0.0)
    if demand.num_gpus > available and demand.num_gpus > _scalable_gpus():
        raise ConfigError(
            f"the run asks for {demand.num_gpus:g} GPUs ({demand.gpu_text}); the cluster has "
            f"{available:g} and cannot scale further",
            "lower learner.num_ranks, learner.gpus_per_rank, generators.count or generators.gpus",
        )


def _scalable_gpus() -> float:
    """GPUs that the cluster's autoscaler may reach; 0 without one."""
    from ray._private.state import state

    limits = state.get_max_resources_from_cluster_config() or {}
    return float(limits.get("GPU", 0))


def disconnect(connection: Connection) -> None:
    """Leaves a cluster that `connect` joined; a local one ends."""
    if connection.ours:
        ray.shutdown()
