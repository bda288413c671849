"""A Ray cluster of several raylets on this machine, driven through stdin; run as a module.

Commands, a JSON list a line: ["add", NAME, ARGUMENTS], ["remove", NAME] (its processes are
killed) and ["drain", NAME] (its preemption is announced). Each is answered by a JSON line: the
address and the raylet's process id, or null. The end of stdin ends the cluster.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason


def main() -> None:
    """Starts a head without task slots, then does as it is told."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes: dict[str, Any] = {"head": cluster.head_node}
    try:
        answer(cluster, nodes["head"])
        for line in sys.stdin:
            command, name, *arguments = json.loads(line)
            if command == "add":
                nodes[name] = cluster.add_node(**arguments[0])
                answer(cluster, nodes[name])
            elif command == "drain":
                drain(cluster, nodes[name])
                answer(cluster, None)
            else:
                cluster.remove_node(nodes.pop(name), allow_graceful=False)
                answer(cluster, None)
    finally:
        cluster.shutdown()


def drain(cluster: Cluster, node: Any) -> None:
    """What a cloud's notice of preemption leads to: the node goes in two minutes."""
    client = ray._raylet.GcsClient(address=cluster.address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(
        node.node_id, reason, "preempted", int((time.time() + 120) * 1000)
    )
    assert accepted, why


def answer(cluster: Cluster, node: Any) -> None:
    """One line on stdout."""
    pid = node.all_processes["raylet"][0].process.pid if node else None
    print(json.dumps({"address": cluster.address, "pid": pid}), flush=True)


if __name__ == "__main__":
    main()
