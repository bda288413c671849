"""What a run is told: typed sections, and how a file becomes one."""

from raygrpo.config.algorithm import AdvantageSection, LossSection
from raygrpo.config.sections import (
    DataSection,
    EvalSection,
    GeneratorsSection,
    Gpus,
    LearnerSection,
    ModelSection,
    OptimizerSection,
    RewardSection,
    RunConfig,
    SamplingSection,
    Threads,
    Transport,
)

__all__ = [
    "AdvantageSection",
    "DataSection",
    "EvalSection",
    "GeneratorsSection",
    "Gpus",
    "LearnerSection",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "RewardSection",
    "RunConfig",
    "SamplingSection",
    "Threads",
    "Transport",
]
