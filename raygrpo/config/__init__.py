"""The configuration of a run: typed sections, and how a file becomes one."""

from raygrpo.config.sections import (
    DataSection,
    EvalDataSection,
    EvalSection,
    ModelSection,
    OptimizerSection,
    RewardSection,
    RunConfig,
    Threads,
    Transport,
)

__all__ = [
    "DataSection",
    "EvalDataSection",
    "EvalSection",
    "ModelSection",
    "OptimizerSection",
    "RewardSection",
    "RunConfig",
    "Threads",
    "Transport",
]
