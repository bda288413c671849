"""Which nodes are about to go, and who is on them."""

from __future__ import annotations

from collections.abc import Sequence

from ray._private.state import state

from raygrpo.actors.pool.workers import Worker


def on_draining_nodes(workers: Sequence[Worker]) -> list[Worker]:
    """The workers on nodes that drain: a preemption is announced, or an autoscaler removes them."""
    draining = state.get_draining_nodes()
    found = [(w, state.actor_table(w.actor._actor_id.hex())) for w in workers if draining]
    return [w for w, table in found if table.get("Address", {}).get("NodeID") in draining]
