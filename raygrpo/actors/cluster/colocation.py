"""Generators beside learner ranks: a placement group with one bundle for each rank."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raygrpo.actors.cluster.placement import labels_of
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError


def bundles_of(config: RunConfig, *, local: bool) -> list[dict[str, float]]:
    """The resources that each learner rank reserves with its generators, one bundle a rank.

    Example: a rank with 0.6 of a GPU and a generator with 0.4 are ``{"GPU": 1.0}``. Generator i is
    with rank ``i % num_ranks``. No bundles without colocation, nor on a local cluster without GPUs,
    whose CPUs are shared. The configuration is a resolved one.
    """
    if config.generators.placement != "colocate":
        return []
    gpus, threads = config.ray.gpus, config.ray.threads
    count, num_ranks = config.generators.count, config.learner.num_ranks
    bundles = []
    for rank in range(num_ranks):
        beside = len(range(rank, count, num_ranks))
        bundle = {"GPU": gpus.learner + beside * gpus.generator}
        if not local:
            bundle["CPU"] = float(threads.learner + beside * threads.generator)
        bundles.append({name: amount for name, amount in bundle.items() if amount})
    return bundles if all(bundles) else []


class Colocation:
    """The reserved places of learner ranks and generators; without bundles there are none.

    Raises:
        ConfigError: the cluster did not offer the bundles within ``ray.timeouts_s.start``.
    """

    def __init__(self, config: RunConfig, *, local: bool) -> None:
        self._num_ranks = config.learner.num_ranks
        self._group: Any = None
        bundles = bundles_of(config, local=local)
        if not bundles:
            return
        labels = labels_of(config, "learner")
        selector = [labels] * len(bundles) if labels else None
        self._group = placement_group(bundles, strategy="PACK", bundle_label_selector=selector)
        ready, _ = ray.wait([self._group.ready()], timeout=config.ray.timeouts_s.start)
        if not ready:
            self.close()
            raise ConfigError(
                f"no nodes have room for {len(bundles)} bundles of {bundles[0]}, "
                "each a learner rank with its generators",
                "lower ray.gpus, or set generators.placement: disaggregate",
            )

    def options(self, index: int) -> dict[str, Any]:
        """Ray options of rank or generator ``index``; they replace the role's labels."""
        if self._group is None:
            return {}
        bundle = index % self._num_ranks
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return {"scheduling_strategy": place, "label_selector": None}

    def close(self) -> None:
        """Gives the places back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
