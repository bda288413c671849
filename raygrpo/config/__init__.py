"""The configuration of a run: typed sections, and how a file becomes one."""

from raygrpo.config.algorithm import AdvantageSection, LossSection
from raygrpo.config.sections import (
    DataChanges,
    DataSection,
    EvalDataSection,
    EvalSection,
    GeneratorsSection,
    Gpus,
    LearnerSection,
    ModelSection,
    OptimizerSection,
    PartSection,
    RewardSection,
    RunConfig,
    SamplingSection,
    Threads,
    Transport,
)

__all__ = [
    "AdvantageSection",
    "DataChanges",
    "DataSection",
    "EvalDataSection",
    "EvalSection",
    "GeneratorsSection",
    "Gpus",
    "LearnerSection",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "PartSection",
    "RewardSection",
    "RunConfig",
    "SamplingSection",
    "Threads",
    "Transport",
]
