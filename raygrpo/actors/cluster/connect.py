"""The one place where a driver joins a Ray cluster, or starts a local one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray._private.label_utils import validate_label_selector

from raygrpo.actors.cluster.placement import (
    ROLES,
    Demand,
    Nodes,
    Roles,
    address_of,
    check_local_labels,
    demand_of,
    unplaceable,
)
from raygrpo.actors.process import children_keep_heaps
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, InfraError

_PLACES_FIX = (
    "start nodes that have them (ray start --labels=..., labels of the worker group), or change "
    "ray.labels, ray.threads or the counts"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A joined cluster, which has room for the ``roles`` of a run's configuration.

    On a ``local`` one actors reserve no CPUs: the run has the machine for itself. ``ours`` is False
    where the caller had joined before: then the caller leaves the cluster, too.
    """

    local: bool
    ours: bool
    config: RunConfig
    roles: Roles


def connect(config: RunConfig, roles: Roles = ROLES) -> Connection:
    """Joins the cluster that the configuration names and checks that these roles fit.

    Raises:
        ConfigError: no nodes have the labels, CPUs or GPUs asked for, and no autoscaler adds any.
        InfraError: no cluster answers at the address.
    """
    address, demand = address_of(config), demand_of(config, roles)
    local, ours = False, not ray.is_initialized()
    if ours:
        local = address == "local"
        _start_local(demand) if local else _join(address)
    connection = Connection(local=local, ours=ours, config=config, roles=roles)
    try:
        _check_gpus(demand)
        _check_places(connection)
    except ConfigError:
        disconnect(connection)
        raise
    return connection


def _start_local(demand: Demand) -> None:
    # By default Ray protects a local cluster by a token. Ray reads that mode when it is imported:
    # a change here would lock this process out of its own cluster.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with contextlib.nullcontext() if demand.num_gpus else children_keep_heaps():
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                num_cpus=max(os.cpu_count() or 1, demand.num_processes),
            )
    except Exception as error:
        # Ray raises a plain Exception when a node is slow to start.
        if type(error) is not Exception and not isinstance(error, (RuntimeError, OSError)):
            raise
        raise InfraError(
            f"Ray does not start here: {error}", "see the newest session under /tmp/ray"
        ) from None


def _join(address: str) -> None:
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InfraError(
            f"no Ray cluster answers at {address!r}: {error}",
            "check ray.address (or RAY_ADDRESS), and RAY_AUTH_TOKEN where the cluster has one",
        ) from None


def _check_gpus(demand: Demand) -> None:
    available = ray.cluster_resources().get("GPU", 0.0)
    if demand.num_gpus > available and not _grows():
        raise ConfigError(
            f"the run asks for {demand.num_gpus:g} GPUs ({demand.gpu_text}); the cluster has "
            f"{available:g} and cannot scale further",
            "lower learner.num_ranks, generators.count or ray.gpus",
        )


def _check_places(connection: Connection) -> None:
    config, roles = connection.config, connection.roles
    if connection.local:
        return check_local_labels(config, roles)
    for role, selector in config.ray.labels.items():
        if problem := validate_label_selector(selector):
            raise ConfigError(f"ray.labels.{role}: {problem}")
    if not _grows() and (reason := unplaceable(config, living_nodes(), roles)):
        raise ConfigError(reason, _PLACES_FIX)


@contextlib.contextmanager
def placing(connection: Connection) -> Iterator[None]:
    """Around a start: the error of one that took too long names the role that found no node."""
    try:
        yield
    except InfraError as error:
        missing = not connection.local and unplaceable(
            connection.config, living_nodes(), connection.roles
        )
        if missing:
            raise InfraError(f"{error.message}: {missing}", _PLACES_FIX) from error
        raise


def living_nodes() -> Nodes:
    """The living nodes of the joined cluster, as `ray.nodes` lists them."""
    return [node for node in ray.nodes() if node["Alive"]]


def _grows() -> bool:
    """Whether an autoscaler manages the cluster: an autoscaler labels each node by its type."""
    return any("ray.io/node-group" in node["Labels"] for node in living_nodes())


def disconnect(connection: Connection) -> None:
    """Leaves a cluster that `connect` joined; a local one ends."""
    if connection.ours:
        ray.shutdown()
