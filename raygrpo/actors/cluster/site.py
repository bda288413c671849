"""Where a run's actors live, and what each of them is told beside its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygrpo.actors.cluster.colocation import Colocation
from raygrpo.actors.profiling import ProfileRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The place of a run's actors.

    Example: on a laptop, ``Site(local=True, logs=Path("grpo_output/logs"))``.

    Attributes:
        local: whether the cluster is the run's own Ray on this machine, where actors reserve no
            CPUs.
        logs: where actors write their output; None leaves it to Ray's own logs.
        profile: the step to trace.
        places: reserved places of learner ranks and generators; None places them as usual.
    """

    local: bool
    logs: Path | None = None
    profile: ProfileRequest | None = None
    places: Colocation | None = None

    def options(
        self,
        index: int | None,
        *,
        threads: int,
        gpus: float = 0.0,
        labels: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Ray options of an actor; ``index`` is that of a rank or generator, None of any other.

        ``labels`` select the nodes that may run the actor. Threads are set inside the actor: a
        runtime environment would start a new process beside those that Ray keeps ready.
        """
        options: dict[str, Any] = {"num_cpus": 0 if self.local else threads, "num_gpus": gpus}
        if labels:
            options["label_selector"] = dict(labels)
        if self.places is None or index is None:
            return options
        return options | self.places.options(index)
