"""Keys that got another name: the error for an unknown key names the new one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MOVED: Mapping[str, str] = MappingProxyType(
    {
        "learner.ref_sync.steps": "learner.reference.sync_steps",
        "learner.ref_sync.alpha": "learner.reference.sync_alpha",
        "learner.deepspeed.sequence_parallel_size": "learner.sequence_parallel",
        "generators.options.weight_transfer": "weights.transport",
    }
)
