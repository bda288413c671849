"""Metrics of a version on its way from the learner to the generators: see docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping

from raygrpo.actors.weight_sync import LoadReport
from raygrpo.weights.types import PublishReport


def publish_metrics(report: PublishReport, publish_s: float) -> dict[str, float]:
    """The metrics of a published version; ``publish_s`` is the duration of the publication."""
    metrics = {
        "sync/publish_s": publish_s,
        "sync/bytes": float(report.num_bytes),
        "sync/full_bytes": float(report.full_bytes),
    }
    if report.changed_frac is not None:
        metrics["sync/changed_frac"] = report.changed_frac
    return metrics


def with_load(metrics: Mapping[str, float], load: LoadReport) -> dict[str, float]:
    """``metrics`` with one more generator's load; of several generators the worst counts."""
    worst = {
        "sync/load_s": load.load_s,
        "sync/stall_s": load.stall_s,
        "sync/probe_s": load.probe_s,
    }
    if load.probe_gap is not None:
        worst["sync/probe_gap"] = load.probe_gap
    return {**metrics, **{name: max(metrics.get(name, 0.0), x) for name, x in worst.items()}}
