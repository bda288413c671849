"""The DeepSpeed configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.config.file import merged_sections
from raygrpo.errors import ConfigError

# Elements of a communication bucket; DeepSpeed's own 5e8 would hold 2 GB of fp32 for one.
BUCKET_ELEMENTS = 50_000_000

# Refused keys, and raygrpo's key in their place: these would make an update another one than the
# configuration describes.
_REFUSED = {
    "train_batch_size": "train.groups_per_step",
    "train_micro_batch_size_per_gpu": "train.tokens_per_microbatch",
    "gradient_accumulation_steps": "train.tokens_per_microbatch",
    "managed_gradient_accumulation": "train.tokens_per_microbatch",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.lr and optimizer.adamw",
    "scheduler": "optimizer.schedule and optimizer.warmup_updates",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "torch_autocast": "model.dtype",
    "zero_optimization.stage": "learner.zero_stage",
    "zero_optimization.compute_grad_norm": "optimizer.max_grad_norm",
}
# Keys about the place of the state, its transport and the log. DeepSpeed itself ignores unknown
# top-level keys in silence.
_SUPPORTED = {"zero_optimization", "checkpoint", "comms_logger", "flops_profiler",
              "steps_per_print", "wall_clock_breakdown"}  # fmt: skip


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration, the user's ``learner.deepspeed`` merged over ours.

    Gradients are summed over the microbatches of one optimizer update. The number of microbatches
    varies, so DeepSpeed gets a batch size of 1 and a call at each update's end. DeepSpeed clips to
    1.0 by default, so ``gradient_clipping`` is always set; stage 0 in fp32 reports no norm, and the
    learner clips in its place.

    Raises:
        ConfigError: a key in ``learner.deepspeed`` is not supported, or would change an update.
    """
    user = config.learner.deepspeed
    _refuse(user)
    stage = config.learner.zero_stage
    bf16 = config.model.dtype == "bfloat16"
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips_itself(config) else config.optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
    }
    if bf16 and stage:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged_sections(ours, user)


def check_learner(config: RunConfig) -> None:
    """Refuses options of DeepSpeed and peft that the learner cannot use, without a learner.

    Raises:
        ConfigError: in ``learner.deepspeed`` or ``learner.lora``.
    """
    deepspeed_config(config)
    if config.learner.lora:
        from raygrpo.learner.lora import lora_config

        lora_config(config)


def clips_itself(config: RunConfig) -> bool:
    """Whether the learner, not DeepSpeed, takes the norm and clips."""
    return config.learner.zero_stage == 0 and config.model.dtype == "float32"


def _refuse(user: Mapping[str, Any]) -> None:
    zero = user.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError("learner.deepspeed.zero_optimization must be a mapping")
    given = [*user, *(f"zero_optimization.{name}" for name in zero)]
    for name in given:
        if name in _REFUSED:
            raise ConfigError(
                f"learner.deepspeed.{name} cannot be set there", f"set {_REFUSED[name]}"
            )
        if "." not in name and name not in _SUPPORTED:
            raise ConfigError(
                f"learner.deepspeed.{name} is not supported", f"use {', '.join(sorted(_SUPPORTED))}"
            )
    for name, value in zero.items():
        if name.startswith("zero_quantized_") and value:
            raise ConfigError(
                f"learner.deepspeed.zero_optimization.{name} would round what is trained",
                "leave it out",
            )
    for part in ("offload_optimizer", "offload_param"):
        section = zero.get(part) or {}
        if isinstance(section, Mapping) and section.get("device") == "nvme":
            raise ConfigError(
                f"learner.deepspeed.zero_optimization.{part} to nvme is not supported",
                "set its device to cpu",
            )
