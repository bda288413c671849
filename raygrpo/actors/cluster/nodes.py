"""Which nodes are about to go, and who is on them."""

from __future__ import annotations

from collections.abc import Sequence

from ray._private.state import state

from raygrpo.actors.pool.workers import Worker


def on_draining_nodes(workers: Sequence[Worker]) -> list[Worker]:
    """The workers on nodes that drain: a preemption is announced, or an autoscaler removes them."""
    draining = state.get_draining_nodes()
    if not draining:
        return []
    return [worker for worker in workers if _node_of(worker) in draining]


def _node_of(worker: Worker) -> str:
    found = state.actor_table(worker.actor._actor_id.hex())
    node: str = found.get("Address", {}).get("NodeID", "")
    return node
