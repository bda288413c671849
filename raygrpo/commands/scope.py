"""What a command that starts actors holds until its end: signals, a cluster, things to close."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from raygrpo.actors.cluster.connect import Connection, connect, disconnect, living_nodes
from raygrpo.actors.cluster.engine_probe import settle_engine
from raygrpo.actors.cluster.placement import ROLES, Roles
from raygrpo.checks.resolved import Facts, Resolved, resolve
from raygrpo.commands.signals import StopSignals
from raygrpo.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A joined cluster, and the run's configuration as it holds there."""

    connection: Connection
    resolved: Resolved

    @property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        return self.resolved.config


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The open scope of a command; ``closers`` run in reverse order at its end."""

    signals: StopSignals
    closers: contextlib.ExitStack

    def join(
        self, config: RunConfig, roles: Roles = ROLES, *, recorded: str | None = None
    ) -> Cluster:
        """Joins the cluster of a checked configuration, which needs room for these roles.

        ``recorded`` is the engine that a resumed run began with.

        Raises:
            ConfigError: the cluster has no room, or the run began with another engine.
            InfraError: no cluster answers.
        """
        with self.signals.kept():
            connection = connect(config, roles)
            self.closers.callback(disconnect, connection)
        facts = Facts(
            local=connection.local,
            cores=os.cpu_count() or 1,
            engine=settle_engine(config, recorded, local=connection.local),
            nodes=() if connection.local else living_nodes(),
        )
        return Cluster(connection=connection, resolved=resolve(config, facts))


@contextlib.contextmanager
def open_scope() -> Iterator[Scope]:
    """Takes the signals over; closes everything at the end, which no signal interrupts."""
    signals = StopSignals()
    with contextlib.ExitStack() as closers:
        closers.callback(signals.uninstall)
        signals.install()
        try:
            yield Scope(signals=signals, closers=closers)
        finally:
            with signals.during(lambda: None):
                closers.close()
