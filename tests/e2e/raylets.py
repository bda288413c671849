"""A Ray cluster of several raylets on this machine, driven through stdin; run as a module.

Commands, a JSON list a line: ["add", NAME, ARGUMENTS] and ["remove", NAME] (its processes are
killed). Each is answered by a JSON line: the address and the raylet's process id, or null. The end
of stdin ends the cluster.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ray.cluster_utils import Cluster


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
            else:
                cluster.remove_node(nodes.pop(name), allow_graceful=False)
                answer(cluster, None)
    finally:
        cluster.shutdown()


def answer(cluster: Cluster, node: Any) -> None:
    """One line on stdout."""
    pid = node.all_processes["raylet"][0].process.pid if node else None
    print(json.dumps({"address": cluster.address, "pid": pid}), flush=True)


if __name__ == "__main__":
    main()
