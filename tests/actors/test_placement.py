"""Which cluster can hold a run, and what a run reserves on it."""

from __future__ import annotations

from typing import Any

import pytest

from raygrpo.actors.cluster.placement import (
    check_local_labels,
    check_run_dir,
    cluster_threads,
    demand_of,
    local_threads,
    nodes_with,
    unplaceable,
)
from raygrpo.actors.cluster.site import Site
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from tests import builders


def config(**sections: Any) -> RunConfig:
    return builders.config(**{"scorers": {"count": 1}, **sections})


def node(cpus: float, gpus: float = 0, **labels: str) -> dict[str, Any]:
    return {"Resources": {"CPU": cpus, "GPU": gpus}, "Labels": labels}


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ("spot", {"spot"}),
        ("!spot", {"steady", "none"}),
        ("in(spot,steady)", {"spot", "steady"}),
        ("!in(spot,steady)", {"none"}),
    ],
)
def test_selectors(wanted: str, fits: set[str]) -> None:
    nodes = [node(1, kind="spot"), node(1, kind="steady"), node(1)]
    found = nodes_with(nodes, {"kind": wanted})
    assert {each["Labels"].get("kind", "none") for each in found} == fits


def test_threads_share_the_nodes_of_the_role() -> None:
    run = config(generators={"count": 3}, ray={"labels": {"learner": {"role": "learner"}}})
    nodes = [node(0, role="head"), node(16, role="learner"), node(8)]
    threads = cluster_threads(run, nodes)
    # The learner's: (16 - 1 scorer) // 4; the generators' may be anywhere: (24 - 1) // 4.
    assert (threads.learner, threads.generator) == (3, 5)
    assert unplaceable(run, nodes) == ""
    # What is set stays, and no node at all (one may yet come) means one thread.
    kept = cluster_threads(config(ray={"threads": {"learner": 7}}), [])
    assert (kept.learner, kept.generator) == (7, 1)


@pytest.mark.parametrize(("staleness", "shares"), [(0, (4, 2)), (1, (1, 1))])
def test_threads_share_one_machine(staleness: int, shares: tuple[int, int]) -> None:
    """In turns each side has all cores; at the same time ranks and generators share them."""
    sections = {"learner": {"num_ranks": 2}, "generators": {"count": 4}}
    run = config(**sections, train={"max_staleness": staleness})
    threads = local_threads(run, cores=8)
    assert (threads.learner, threads.generator) == shares
    assert local_threads(run, cores=1).learner == 1
    kept = local_threads(config(ray={"threads": {"learner": 7}}), cores=2)
    assert (kept.learner, kept.generator) == (7, 2)


def test_a_role_that_is_not_started_needs_no_place() -> None:
    run = config(ray={"labels": {"learner": {"role": "gone"}}, "gpus": {"learner": 1}})
    alone = ["generator", "scorer"]
    assert "ray.labels.learner" in unplaceable(run, [node(16)])
    assert unplaceable(run, [node(16)], alone) == ""
    assert (demand_of(run).num_gpus, demand_of(run, alone).num_gpus) == (1, 0)
    check_local_labels(run, alone)
    with pytest.raises(ConfigError, match="local Ray has no labels"):
        check_local_labels(run)


def test_reward_models_have_their_cores() -> None:
    models = [{"func": "reward_model", "params": {"path": "org/m", "count": 2, "threads": 2}}]
    run = config(rewards=models)
    threads = cluster_threads(run, [node(16)])
    # (16 - 1 scorer - 2 models of 2 threads) // 2
    assert (threads.learner, threads.generator) == (5, 5)
    assert unplaceable(run, [node(16)]) == ""
    kept = config(rewards=models, ray={"threads": {"learner": 5, "generator": 5}})
    assert "reserves 15 CPUs" in unplaceable(kept, [node(7), node(7)])


def test_what_is_missing_is_named() -> None:
    run = config(
        learner={"num_ranks": 2},
        generators={"count": 2},
        ray={
            "labels": {"learner": {"role": "learner"}},
            "threads": {"learner": 2, "generator": 2},
            "gpus": {"generator": 0.5},
        },
    )
    spare = node(16, gpus=1)
    assert "ray.labels.learner (role=learner)" in unplaceable(run, [spare])
    assert "cannot hold 2 learners of 2 CPUs" in unplaceable(run, [spare, node(3, role="learner")])
    held = node(4, role="learner")
    assert unplaceable(run, [spare, held]) == ""
    # Half a GPU each on two nodes is no room for one that wants a whole one.
    assert "cannot hold 2 generators" in unplaceable(run, [held, node(16, gpus=0.5)])
    # Each role alone fits on these nine CPUs; learner, generators and scorers together do not.
    both = config(ray={"threads": {"learner": 4, "generator": 5}})
    assert "the run reserves 10 CPUs" in unplaceable(both, [node(9)])
    assert unplaceable(both, [node(10)]) == ""


def test_a_local_cluster_reserves_no_cores() -> None:
    assert Site(local=True).options(None, threads=4) == {"num_cpus": 0, "num_gpus": 0.0}
    options = Site(local=False).options(0, threads=4, gpus=1, labels={"role": "learner"})
    assert options == {"num_cpus": 4, "num_gpus": 1, "label_selector": {"role": "learner"}}


def test_a_job_needs_an_absolute_run_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    check_run_dir(config(run_dir="grpo_output"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    check_run_dir(config(run_dir="/shared/run"))
    check_run_dir(config(run_dir="~/run"))
    with pytest.raises(ConfigError, match="in the job's copy of the working directory"):
        check_run_dir(config(run_dir="grpo_output"))
