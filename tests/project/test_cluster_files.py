"""The files in cluster/, checked without a cluster: by Ray's validators, and by running them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from raygrpo.actors.cluster.placement import unplaceable
from raygrpo.config.file import load_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


KUBERAY = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml")


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_pods_are_consistent(name: str) -> None:
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = set()
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        images.add(container["image"])
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        # The run directory is on a volume that every pod has.
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert container["envFrom"] == [
            {"secretRef": {"name": "raygrpo-secrets", "optional": True}}
        ]
        # GPUs cannot be overcommitted, and a pod above its memory request is the first to go.
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len(images) == 1, "all nodes run the same image"
    assert images.pop().split(":")[1].startswith(metadata.version("raygrpo"))
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # In rayStartParams, labels would be out of the autoscaler's sight.
        assert "labels" not in group["rayStartParams"]
    spot = [g for g in groups if "cloud.google.com/gke-spot" in str(g["template"]["spec"])]
    assert [group["groupName"] for group in spot] == ["generator"]


def test_the_job_makes_the_cluster_of_the_other_file() -> None:
    assert cluster_spec(KUBERAY[0]) == cluster_spec(KUBERAY[1])
    job = load(KUBERAY[1])["spec"]
    environment = yaml.safe_load(job["runtimeEnvYAML"])
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}, "no secrets in it"
    grace = cluster_spec(KUBERAY[1])["headGroupSpec"]["template"]["spec"]
    assert grace["terminationGracePeriodSeconds"] >= 600
    assert "python -m raygrpo train cluster/config.yaml" in job["entrypoint"]


def node_types(name: str) -> dict[str, Any]:
    """What the autoscaler will make of a file: node types with resources, labels and limits."""
    if name.startswith("kuberay"):
        from ray.autoscaler._private.kuberay import autoscaling_config

        resource = {"metadata": {"name": "raygrpo", "namespace": "default"}}
        derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(
            {**resource, "spec": cluster_spec(name)}
        )
    else:
        from ray.autoscaler._private.util import prepare_config, validate_config

        derived = prepare_config(load(name))
        validate_config(derived)
    types: dict[str, Any] = derived["available_node_types"]
    assert sum(t["max_workers"] for t in types.values()) <= derived["max_workers"]
    return types


@pytest.mark.parametrize("name", [*KUBERAY, "aws.yaml", "gcp.yaml"])
def test_the_example_run_fits_the_cluster_at_its_largest(name: str) -> None:
    types = node_types(name)
    head = types.pop("headgroup", None) or types.pop("head")
    assert head["resources"]["CPU"] == 0, "the head has no task slots"
    nodes = [
        {"Resources": kind["resources"], "Labels": kind["labels"]}
        for kind in types.values()
        for _ in range(kind["max_workers"])
    ]
    config = load_config(CLUSTER / "config.yaml")
    assert unplaceable(config, nodes) == ""
    assert {kind["labels"]["role"] for kind in types.values()} == set(config.ray.labels)
    # Not by luck: without its nodes, each role is missed.
    for role in config.ray.labels:
        rest = [node for node in nodes if node["Labels"]["role"] != role]
        assert f"ray.labels.{role}" in unplaceable(config, rest)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_up_files(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    spot = {kind for kind, it in types.items() if "spot" in str(it["node_config"]).lower()}
    assert spot == {"generator"}
    assert all(it["min_workers"] == 0 for kind, it in types.items() if kind != "head")
    # The token and the secrets travel as files, never as text of a command.
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    setup = "\n".join(config["setup_commands"])
    assert check_pins(re.findall(r'"([\w\[\]-]+)==([\d.]+)"', setup)) >= 4


def check_pins(pins: list[tuple[str, str]]) -> int:
    """Every pin is allowed by pyproject.toml; one that is installed here is what is tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {r.name: r for r in map(Requirement, project["dependencies"])}
    for name, version in pins:
        package = name.partition("[")[0]
        assert version in allowed[package].specifier, f"{name}=={version}"
    return len(pins)


def test_dockerfile() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    joined = text.replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in joined.splitlines() if line[:1].isupper()]
    arguments = dict(v.split("=") for k, v in instructions if k == "ARG")
    assert arguments.pop("DEVICE") == "cpu"
    assert check_pins([(name.lower(), version) for name, version in arguments.items()]) == 5
    for name in arguments:
        assert f"=={'$'}{{{name}}}" in text, f"ARG {name} is not used"
    versions = {load(KUBERAY[0])["spec"]["rayVersion"], arguments["RAY"]}
    assert versions == {metadata.version("ray")}
    for keyword, value in instructions:
        if keyword == "COPY":
            *sources, _ = [v for v in value.split() if not v.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), value
        if keyword == "FROM":
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", value), "a pinned tag"
    assert [v for k, v in instructions if k == "USER"][-1] != "root"
    assert not re.search(r"(?i)(token|secret|password|api_key)\s*=", text)


FAKES = {
    "srun": """
        while [ "${1#--}" != "$1" ]; do
            case "$1" in --nodes=*) count="${1#--nodes=}" ;; esac
            shift
        done
        if [ "$1" = hostname ]; then echo "10.0.0.7 172.17.0.1"; exit; fi
        export SLURM_CPUS_ON_NODE=16
        pids=""
        for node in $(seq 0 $((count - 1))); do SLURM_NODEID="$node" "$@" & pids="$pids $!"; done
        worst=0
        for pid in $pids; do
            wait "$pid" || { code=$?; [ $code -le $worst ] || worst=$code; }
        done
        exit $worst
    """,
    "scontrol": """
        if [ "$1" = show ]; then printf 'n0\\nn1\\nn2\\n'; else echo "$@" > "$OUT/scontrol"; fi
    """,
    # As ray symmetric-run does, it runs the command on the first node and hands its code on.
    "ray": """
        printf '%s\\n' "$@" > "$OUT/ray-$SLURM_NODEID"
        [ "$SLURM_NODEID" = 0 ] || exit 0
        while [ "$1" != "--" ]; do shift; done
        shift
        exec "$@"
    """,
    "python": """
        trap 'echo stopped > "$OUT/stopped"; exit 3' TERM
        { printf '%s\\n' "$@"; env | grep ^RAY_ ; } > "$OUT/python.tmp"
        mv "$OUT/python.tmp" "$OUT/python"
        [ -z "$HOLD" ] || while :; do sleep 0.05; done
    """,
}


def slurm(
    directory: Path, *arguments: str, nodes: int = 3, hold: str = ""
) -> subprocess.Popen[str]:
    """Starts cluster/slurm.sh among programs that stand in for Slurm's, and for Ray's."""
    (directory / "bin").mkdir()
    for name, body in FAKES.items():
        program = directory / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}")
        program.chmod(0o755)
    environment = {
        "PATH": f"{directory}/bin:{os.environ['PATH']}",
        "OUT": str(directory),
        "HOLD": hold,
        "TMPDIR": str(directory),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "n[0-2]",
    }
    return subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sh"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_slurm_commands(tmp_path: Path) -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    process = slurm(tmp_path, "my config.yaml", "--train.steps=5")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    words = (tmp_path / "python").read_text().splitlines()
    assert words[:5] == ["-m", "raygrpo", "train", "my config.yaml", "--train.steps=5"]
    assert "RAY_ADDRESS=10.0.0.7:24711" in words
    assert "RAY_AUTH_MODE=token" in words
    (token,) = [w.partition("=")[2] for w in words if w.startswith("RAY_AUTH_TOKEN=")]
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert not (tmp_path / "scontrol").exists(), "a finished run is not queued again"

    known = {option for parameter in start.params for option in parameter.opts}
    for node in range(3):
        text = (tmp_path / f"ray-{node}").read_text()
        assert token not in text
        command, *rest = text.splitlines()
        own = rest[: rest.index("--")]
        assert command == "symmetric-run"
        assert own[:4] == ["--address", "10.0.0.7:24711", "--min-nodes", "3"]
        # The options that are left are Ray's, and none that symmetric-run refuses.
        for_start = curate_and_validate_ray_start_args(list(own))
        assert for_start == own[4:]
        assert {option.partition("=")[0] for option in for_start} <= known
        assert f"--labels=role={'learner' if node == 0 else 'generator'}" in for_start


def test_slurm_stops_in_order_and_queues_the_job_again(tmp_path: Path) -> None:
    process = slurm(tmp_path, "config.yaml", nodes=1, hold="yes")
    deadline = time.monotonic() + 60
    while not (tmp_path / "python").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert "--labels" not in (tmp_path / "ray-0").read_text(), "one node holds every role"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert (tmp_path / "stopped").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert not list(tmp_path.glob("*.pid"))


def test_slurm_without_a_configuration(tmp_path: Path) -> None:
    process = slurm(tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.startswith("usage: sbatch")


def test_the_readmes_job_environments_are_json() -> None:
    for block in re.findall(r"--runtime-env-json '(.*?)'", (CLUSTER / "README.md").read_text()):
        json.loads(block)
