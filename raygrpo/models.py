"""Hugging Face models for engines and learner: loading, masks, windows, logit transforms."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from raygrpo.algorithm.logprobs import LogitTransform
from raygrpo.config import ModelSection
from raygrpo.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(model: ModelSection) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: there is no model or no tokenizer at ``model.path``.
    """
    from transformers import AutoTokenizer

    check_model_path(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.path {model.path!r} has no tokenizer that loads: {error}",
            "save the tokenizer beside the weights (tokenizer.save_pretrained)",
        ) from None
    if tokenizer is None or not len(tokenizer):
        raise ConfigError(f"model.path {model.path!r} has an empty tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model_path(model: ModelSection) -> None:
    """Refuses a local directory that cannot be a model, without loading anything."""
    path = Path(model.path).expanduser()
    looks_local = path.is_absolute() or model.path.startswith(("./", "../", "~"))
    if not path.exists():
        if looks_local or model.path.count("/") > 1:
            raise ConfigError(f"model.path {model.path!r} does not exist", "check the path")
        return
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path {model.path!r} has no config.json", "name a model directory")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"model.path {model.path!r} has no tokenizer",
            "save the tokenizer beside the weights (tokenizer.save_pretrained)",
        )
    if not model.random_init and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"model.path {model.path!r} has no *.safetensors weights",
            "save the model with save_pretrained, or set model.random_init: true",
        )


def anchored_model(model: ModelSection) -> ModelSection:
    """The section with a local directory's path made absolute, for processes elsewhere."""
    path = Path(model.path).expanduser()
    return model.model_copy(update={"path": str(path.absolute())}) if path.exists() else model


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(model: ModelSection, *, seed: int, dtype: torch.dtype) -> Any:
    """The model in ``dtype`` on CPU; with ``random_init``, fresh weights drawn from ``seed``.

    Raises:
        ConfigError: the model does not load, or its attention is not supported.
    """
    try:
        with quiet_transformers():
            try:
                loaded = _load(model, seed, dtype, "sdpa")
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                # Gemma 2 caps the logits of its attention, and SDPA cannot.
                loaded = _load(model, seed, dtype, "eager")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.path {model.path!r} does not load: {error}") from error
    attention_windows(loaded.config)
    return loaded


def _load(model: ModelSection, seed: int, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    common = {"trust_remote_code": model.trust_remote_code, "attn_implementation": attention}
    if not model.random_init:
        return AutoModelForCausalLM.from_pretrained(
            model.path, revision=model.revision, dtype=dtype, **common
        )
    config = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(config, dtype=dtype, **common)
    with contextlib.suppress(OSError):  # without generation_config.json, config.json's will do
        fresh.generation_config = GenerationConfig.from_pretrained(
            model.path, revision=model.revision
        )
    return fresh


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' loading chatter out of the run's log; warnings stay."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.WARNING)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a completion: of the generation config, else the tokenizer's end of sequence."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def logit_transform(config: Any) -> LogitTransform:
    """The logit transform in the model's configuration (Gemma, Cohere and Granite have one)."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    cap = getattr(text, "final_logit_softcapping", None)
    return LogitTransform(scale=scale, cap=None if cap is None else float(cap))


def attention_windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each kind of layer; None for layers that see everything.

    Kinds have transformers' names, for example {"full_attention": None, "sliding_attention": 512};
    a model without names has one kind, "".

    Raises:
        ConfigError: a layer is of another kind than these two.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    if not kinds:
        return {"": window}
    if set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"models of type {text.model_type!r} have attention of the kinds {kinds}, "
            "which is not supported",
            "use a model with full or sliding-window attention",
        )
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def attention_masks(
    config: Any,
    allowed: Bool[Tensor, "B Q K"],
    query_positions: Int[Tensor, "B Q"],
    key_positions: Int[Tensor, "B K"],
    dtype: torch.dtype,
) -> Float[Tensor, "B 1 Q K"] | dict[str, Float[Tensor, "B 1 Q K"]]:
    """Additive masks for the model's forward: one, or one for each kind of layer.

    A sliding window is a distance of positions, not of columns. A query that may see nothing sees
    everything: its output is not used, and softmax over nothing is NaN.
    """
    masks = {}
    for kind, window in attention_windows(config).items():
        near = allowed
        if window is not None:
            near = allowed & (query_positions[:, :, None] - key_positions[:, None, :] < window)
        near = near | ~near.any(-1, keepdim=True)
        mask = torch.zeros(near.shape, dtype=dtype, device=near.device)
        masks[kind] = mask.masked_fill_(~near, torch.finfo(dtype).min)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


def refuse_unknown(options: Mapping[str, Any], where: str) -> None:
    """Refuses options of a layer that change its attention and are unknown to ``where``.

    Raises:
        ValueError: the message names the option.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name} is not known by {where}")
