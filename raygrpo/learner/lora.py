"""LoRA through peft: a few trained matrices beside frozen weights (arXiv 2106.09685)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, StorageError, nearest
from raygrpo.weights.adapter import PREFIX

if TYPE_CHECKING:
    from jaxtyping import Float

# Arguments under which the adapter merges as W0 + scale * B @ A. The rest of LoraConfig changes the
# base weights, trains others beside the adapter, or is another method.
_SUPPORTED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "use_rslora", "init_lora_weights",
}  # fmt: skip
_INITS = (True, False, "gaussian")
_NAME = "default"


def lora_config(config: RunConfig) -> Any:
    """peft's ``LoraConfig`` of ``learner.lora``.

    Raises:
        ConfigError: an argument is unknown (the message names the nearest known one) or cannot be
            merged, or there is dropout, which would make the ratio of two policies noise.
    """
    from peft import LoraConfig

    given = config.learner.lora
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown key learner.lora.{name}", nearest(name, known))
        if name not in _SUPPORTED:
            raise ConfigError(
                f"learner.lora.{name} is not supported", f"use {', '.join(sorted(_SUPPORTED))}"
            )
    if given.get("lora_dropout"):
        raise ConfigError(
            "learner.lora.lora_dropout makes the ratio of two policies noise", "set it to 0"
        )
    if given.get("init_lora_weights", True) not in _INITS:
        raise ConfigError(
            f"learner.lora.init_lora_weights {given['init_lora_weights']!r} is not supported: "
            "it changes the base weights",
            "set it to true, or gaussian",
        )
    try:
        return LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=config.model.path, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"learner.lora: {error}") from None


def add_adapter(model: nn.Module, config: RunConfig) -> None:
    """Freezes the model and puts an adapter, drawn from the run's seed, beside its linear layers.

    Raises:
        ConfigError: ``target_modules`` names no layer, a layer that is not plainly linear, or the
            language head.
    """
    from peft import inject_adapter_in_model

    settings = lora_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            inject_adapter_in_model(settings, model)
        except (TypeError, ValueError) as error:
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if _is_linear(m)}
            raise ConfigError(
                f"learner.lora: {error}", f"name some of {', '.join(sorted(linear))}"
            ) from None
    for name, layer in _layers(model):
        if not _is_linear(layer.base_layer):
            kind = type(layer.base_layer).__name__
            raise ConfigError(f"learner.lora: {name} is a {kind}", "name linear layers")
        if layer is model.get_output_embeddings():  # type: ignore[operator]
            raise ConfigError(f"learner.lora: {name} is the language head", "name other layers")


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters by their names in the model without adapter, in the model's order."""
    for name, parameter in model.named_parameters():
        if not _is_adapter(name):
            yield name.replace(".base_layer.", "."), parameter


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters by peft's names; none without an adapter."""
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            yield PREFIX + name.replace(f".{_NAME}.", "."), parameter


def _is_adapter(name: str) -> bool:
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes as its base alone.

    The adapter gets a scale of 0: the network's modules still run in the same order, as ZeRO-3's
    prefetching requires.
    """
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer.set_scale(_NAME, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_NAME, 1.0)


def write_adapter(
    directory: Path, tensors: Mapping[str, Float[Tensor, "..."]], config: RunConfig
) -> None:
    """Writes an adapter as ``peft.PeftModel.from_pretrained(base, directory)`` reads it.

    Raises:
        StorageError: the directory cannot be written.
    """
    settings = lora_config(config)
    settings.inference_mode = True
    try:
        directory.mkdir(parents=True, exist_ok=True)
        settings.save_pretrained(str(directory))
        file = directory / "adapter_model.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"cannot write the adapter to {directory}: {error}") from error
