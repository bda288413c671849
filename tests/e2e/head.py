"""A Ray cluster of one node on this machine, for runs that join it and for submitted jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests import runs

RAY = str(Path(sys.executable).with_name("ray"))


class Head:
    """A head of our own, with ports and a directory that no other Ray on the machine has.

    tests/conftest.py sets the token that the head and its clients share.
    """

    def __init__(self) -> None:
        # Not pytest's directory: the paths of Ray's sockets in it would be too long.
        self.temp = tempfile.mkdtemp(prefix="rg", dir="/tmp")
        gcs, self.dashboard, agent = free_ports(3)
        self.address = f"127.0.0.1:{gcs}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(runs.ROOT),
            "RAY_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        without = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", "--num-cpus=16", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={self.temp}"),
                *("--include-dashboard=true", f"--dashboard-port={self.dashboard}"),
                f"--dashboard-agent-listen-port={agent}",
            ],
            env=without,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def job(self, *arguments: str, timeout_s: float = runs.DEADLINE_S) -> tuple[int, str]:
        """Runs ``ray job ...``: its exit code and output."""
        done = subprocess.run(
            ["timeout", "-k", "5", str(timeout_s), RAY, "job", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def submit(
        self, directory: Path, *overrides: str, id: str, wait: bool = True
    ) -> tuple[int, str]:
        """Submits the training of ``directory``'s config.yaml, as the README says."""
        environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", "OMP_NUM_THREADS": "1"}}
        return self.job(
            *("submit", "--working-dir", str(directory), "--submission-id", id),
            *("--runtime-env-json", json.dumps(environment)),
            *(() if wait else ("--no-wait",)),
            *("--", "python", "-m", "raygrpo", "train", "config.yaml", *overrides),
        )

    def end(self) -> None:
        """Ends the head and what is left of it."""
        mine = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(mine, timeout=20)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=20)
        shutil.rmtree(self.temp, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def answers(address: str) -> bool:
    """Whether something listens there."""
    host, _, port = address.partition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0
