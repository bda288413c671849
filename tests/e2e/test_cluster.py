"""Runs over several raylets: roles go where their labels say, and a lost node is no lost run."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import runs

STEPS = 12
# The eleventh group's score waits: by then groups of its step are scored, and not yet trained.
HELD = """
import pathlib, time

calls = 0


def held(completions, gate, **_):
    global calls
    calls += 1
    if calls == 11:
        pathlib.Path(gate, "reached").touch()
        while not pathlib.Path(gate, "go").exists():
            time.sleep(0.01)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""
LABELS = {
    "learner": {"role": "steady"},
    "scorer": {"role": "in(steady,cpu)"},
    "generator": {"role": "spot"},
}
SPOT = {"num_cpus": 2, "labels": {"role": "spot"}}


class Raylets:
    """The cluster's process, which alone may touch its nodes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["timeout", "-k", "10", "600", sys.executable, "-m", "tests.e2e.raylets"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.head = self._answer()
        self.address: str = self.head["address"]

    def add(self, name: str, **arguments: Any) -> int:
        """Starts a node; its raylet's process id."""
        pid: int = self._tell("add", name, arguments)["pid"]
        return pid

    def remove(self, name: str) -> None:
        """Kills a node's processes."""
        self._tell("remove", name)

    def drain(self, name: str) -> None:
        """Announces a node's preemption."""
        self._tell("drain", name)

    def end(self) -> None:
        """Ends the cluster."""
        self._process.communicate(timeout=60)

    def _tell(self, *command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Ray writes to stdout, too.
        for line in self._process.stdout:
            if line.startswith('{"address"'):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise AssertionError("the cluster's process ended")


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    with pytest.MonkeyPatch.context() as patch:
        # Both sides say how they authenticate: a file in the home directory must not matter.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Groups of tests are small; real ones live in the object store of the node they are on.
        patch.setenv("RAY_max_direct_call_object_size", "64")
        raylets = Raylets()
        yield raylets
        raylets.end()


@pytest.fixture(scope="module")
def steady(raylets: Raylets) -> int:
    return raylets.add("steady", num_cpus=2, labels={"role": "steady"})


def roles_on(raylet: int) -> Counter[str]:
    """How many actors of each class live on a node: its raylet's children, by process title."""
    titles = [child.name() for child in psutil.Process(raylet).children()]
    return Counter(t.removeprefix("ray::").partition(".")[0] for t in titles if "Actor" in t)


def config_for(directory: Path, address: str, name: str, **ray: Any) -> Path:
    held = runs.reward(directory, "held", HELD)
    return runs.write_run(
        directory,
        name,
        rewards=[{**held, "params": {"gate": str(directory)}, "timeout_s": 170.0}],
        train={"steps": STEPS, "groups_per_step": 4},
        generators={"count": 2},
        ray={"address": address, "labels": LABELS, **ray},
    )


def test_what_no_node_can_hold_is_said_before_the_start(
    raylets: Raylets, steady: int, tmp_path: Path
) -> None:
    output = runs.run(config_for(tmp_path, raylets.address, "unlabelled"), expected=2)
    assert "no node has the labels of ray.labels.generator (role=spot)" in output
    assert "fix: start nodes that have them" in output


@pytest.mark.slow
def test_a_cluster_that_grows_is_waited_for(raylets: Raylets, steady: int, tmp_path: Path) -> None:
    # An autoscaler's nodes carry their type as this label.
    raylets.add("managed", num_cpus=0, labels={"ray.io/node-group": "head"})
    config = config_for(tmp_path, raylets.address, "waiting", timeouts_s={"start": 20.0})
    output = runs.run(config, expected=4)
    # Which of the starts is late first depends on how busy the machine is.
    assert "took longer than 20 s: no node has the labels of ray.labels.generator" in output


@pytest.mark.slow
def test_a_run_over_two_nodes_outlives_one_of_them(
    raylets: Raylets, steady: int, tmp_path: Path
) -> None:
    spot = raylets.add("spot", **SPOT)
    config = config_for(tmp_path, raylets.address, "run")
    process = runs.start(config)
    runs.wait_for(process, (tmp_path / "reached").exists, "the group whose score is held")

    assert roles_on(steady) == {"LearnerActor": 1, "WeightStoreActor": 1, "ScorerActor": 1}
    assert roles_on(spot) == {"GeneratorActor": 2}
    # The driver's node alone surely sees its run directory; nothing else runs without task slots.
    assert set(roles_on(raylets.head["pid"])) <= {"RolloutWriterActor"}

    raylets.remove("spot")
    (tmp_path / "go").touch()
    runs.wait_for(process, lambda: len(runs.events(config, "worker_replaced")) > 1, "the loss")
    spot = raylets.add("spot again", **SPOT)
    lost_at = len(runs.metrics(config))
    runs.wait_for(process, lambda: len(runs.metrics(config)) > lost_at + 1, "steps after the loss")
    assert roles_on(spot) == {"GeneratorActor": 2}
    runs.finish(process, config)

    rows = runs.metrics(config)
    assert runs.steps(config) == list(range(1, STEPS + 1))
    # The tiny model learns to write digits within six steps at this rate.
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
    replaced = {event["worker"] for event in runs.events(config, "worker_replaced")}
    assert replaced == {"generator-0", "generator-1"}


@pytest.mark.slow
def test_a_preempted_nodes_completions_go_on_elsewhere(
    raylets: Raylets, steady: int, tmp_path: Path
) -> None:
    brief = {"num_cpus": 1, "labels": {"role": "brief"}}
    nodes = {name: raylets.add(name, **brief) for name in ("one", "two")}
    config = runs.write_run(
        tmp_path,
        "preempted",
        deterministic=False,
        # Always in the middle of a group: each takes hundreds of steps, three steps' may be open.
        sampling={"num_completions": 4, "max_tokens": 400, "filters": {"min_tokens": 300}},
        # More steps than it gets to: it is stopped once it has been seen.
        train={"steps": 500, "groups_per_step": 4, "max_staleness": 2, "dynamic_sampling": False,
               "tokens_per_microbatch": 2048},
        generators={"count": 2, "max_rows": 8},
        ray={"address": raylets.address, "labels": {**LABELS, "generator": brief["labels"]}},
    )  # fmt: skip
    process = runs.start(config)
    runs.wait_for_step(process, config, 1)
    assert [roles_on(pid) for pid in nodes.values()] == [{"GeneratorActor": 1}] * 2
    third = raylets.add("three", **brief)
    raylets.drain("two")
    runs.wait_for_event(process, config, "worker_replaced")
    left_at = len(runs.metrics(config))
    # The groups that were handed on are of these steps at the latest.
    runs.wait_for(process, lambda: len(runs.metrics(config)) > left_at + 3, "steps after that")
    process.send_signal(signal.SIGTERM)
    runs.finish(process, config, expected=3)

    (leaving,) = runs.events(config, "worker_leaving")
    assert leaving["reason"] == "its node is drained"
    assert leaving["groups"] > 0
    (replaced,) = runs.events(config, "worker_replaced")
    assert (replaced["worker"], replaced["groups"]) == (leaving["worker"], [])
    rows = runs.metrics(config)
    assert runs.steps(config) == list(range(1, len(rows) + 1))
    last = rows[-1]
    assert last["ledger/aborted"] == last["ledger/lost_groups"] == 0, "what was written is kept"
    assert all(row["ledger/unexplained"] == 0 for row in rows)
    assert third, "where the generator that came in its place runs"
