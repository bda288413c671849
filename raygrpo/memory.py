"""What actors will need of memory, in bytes, from a model's configuration alone: no weights read.

The model is built on torch's meta device, where tensors have shapes and no memory; activations are
what a forward pass there saves for the backward pass. What DeepSpeed, AdamW and the engine hold is
counted by their code. ``tests/parity/test_memory.py`` measures real processes against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raygrpo.algorithm.logprobs import chunk_tokens_for
from raygrpo.config import ModelSection, RunConfig
from raygrpo.engines.choose import planned_engine
from raygrpo.learner.deepspeed_config import BUCKET_ELEMENTS
from raygrpo.learner.sequence_parallel import sequence_ranks
from raygrpo.models import DTYPES

_ATTENTION = "raygrpo_meta"
# Measured on CPUs: what malloc holds between the tensors of a training step.
ALLOCATOR_FRAC = 0.2
# The cache that vLLM gets on a CPU where its options say nothing.
VLLM_CACHE_BYTES = 2 * 2**30
# Resident memory of a process of each role with its libraries, before it loads anything.
BASES = {
    "learner rank": 430 * 2**20,
    "generator": 430 * 2**20,
    "weight store": 150 * 2**20,
    "scorer": 400 * 2**20,
    "driver and Ray": 1200 * 2**20,
}
Parts = dict[str, int]
# Tokens of the forward pass that activations are counted on; they grow in proportion.
_COUNTED_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What is counted of a model.

    ``activations`` are bytes a token that one forward pass keeps, ``hidden`` those of one layer's
    input, ``cached`` those of a token's keys and values in all layers. ``linear`` are the bytes of
    linear layers, ``largest`` the elements of the largest parameter.
    """

    parameters: int
    trained: int
    largest: int
    linear: int
    dtype_bytes: int
    activations: int
    hidden: int
    cached: int
    layers: int
    vocabulary: int
    hidden_size: int


def model_size(section: ModelSection, *, lora: Mapping[str, Any] | None = None) -> ModelSize:
    """Counts a model of this configuration; ``lora`` are peft's arguments, or empty.

    Raises:
        OSError: there is no configuration at the model's path.
    """
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION, _counted_attention)
    config = AutoConfig.from_pretrained(
        section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    dtype = DTYPES[section.dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            trust_remote_code=section.trust_remote_code,
        )
        model.eval()
        if lora:
            from peft import LoraConfig, inject_adapter_in_model

            inject_adapter_in_model(LoraConfig(**lora), model)
        activations = _activations(model) // _COUNTED_TOKENS
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    counts = [parameter.numel() for parameter in model.parameters()]
    return ModelSize(
        parameters=sum(counts),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest=max(counts),
        linear=sum(
            m.weight.numel() * dtype.itemsize
            for m in model.modules()
            if isinstance(m, torch.nn.Linear)
        ),
        dtype_bytes=dtype.itemsize,
        activations=activations,
        hidden=text.hidden_size * dtype.itemsize,
        cached=2 * text.num_hidden_layers * keys * head_dim * dtype.itemsize,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        hidden_size=text.hidden_size,
    )


def _activations(model: Any) -> int:
    """Bytes that a forward pass of one row saves, each storage once, parameters left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[Any] = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    ids = torch.zeros(1, _COUNTED_TOKENS, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(saved.values())


def _counted_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Attention that saves what fused kernels do: inputs, output and a number a row and head."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return output.transpose(1, 2).contiguous(), None


def learner_memory(config: RunConfig, size: ModelSize, *, row_tokens: int) -> Parts:
    """What one rank holds at its peak, by part, the process itself left out.

    ``row_tokens`` are those of its longest row. ``loading`` is what the start takes beyond
    training: each rank loads the whole model, and bfloat16 is probed by a copy in float32.
    """
    section, stage, num_ranks = config.learner, config.learner.zero_stage, config.learner.num_ranks
    shard = 4 * size.trained // (num_ranks if stage else 1)
    held = size.parameters * size.dtype_bytes
    tokens = max(config.train.tokens_per_microbatch, row_tokens) // sequence_ranks(config)
    parts = {
        "parameters": held if stage < 3 else held // num_ranks + _gathered(config, size),
        "master weights": shard if stage or size.dtype_bytes < 4 else 0,
        "gradients": _gradients(stage, size, shard),
        "optimizer": 2 * shard,
        "reduce buckets": min(_bucket_elements(config), size.trained) * 4 if stage else 0,
        "activations": _activation_bytes(config, size, tokens),
        "language head": _head_bytes(size, tokens, fp32=config.model.fp32_head),
        "reference": held if config.loss.beta and not section.lora else 0,
    }
    parts["allocator"] = round(ALLOCATOR_FRAC * sum(parts.values()))
    # AdamW's temporaries, of a rank's flat shard, come when activations are gone; what is that
    # large is taken from the system and given back at once.
    step = parts["parameters"] + parts["master weights"] + parts["optimizer"] + parts["reference"]
    step += min(shard, parts["gradients"]) + 2 * (shard if stage else 4 * size.largest)
    parts["optimizer step"] = max(0, step - sum(parts.values()))
    loading = held + 4 * size.parameters if size.dtype_bytes < 4 else held
    parts["loading"] = max(0, loading - sum(parts.values()))
    return parts


def _gradients(stage: int, size: ModelSize, shard: int) -> int:
    """Stage 0 has a gradient a weight, and in bfloat16 a float32 one for the masters; stage 1 sums
    them whole in float32; the others keep their shard."""
    if stage == 0:
        return size.trained * (4 if size.dtype_bytes == 4 else 2 + 4)
    return 4 * size.trained if stage == 1 else shard


def _zero(config: RunConfig) -> Mapping[str, Any]:
    zero: Mapping[str, Any] = config.learner.deepspeed.get("zero_optimization", {})
    return zero


def _bucket_elements(config: RunConfig) -> int:
    return int(_zero(config).get("reduce_bucket_size", BUCKET_ELEMENTS))


def _gathered(config: RunConfig, size: ModelSize) -> int:
    """Whole parameters that ZeRO-3 keeps between their uses."""
    live = int(_zero(config).get("stage3_max_live_parameters", 10**9))
    return min(live, size.parameters) * size.dtype_bytes


def _activation_bytes(config: RunConfig, size: ModelSize, tokens: int) -> int:
    if not config.learner.gradient_checkpointing:
        return tokens * size.activations
    return tokens * (size.layers * size.hidden + size.activations // size.layers)


def _head_bytes(size: ModelSize, tokens: int, *, fp32: bool) -> int:
    """A chunk's logits, and the gradients of head and embedding before they are added up; the
    former and the head's are in float32 under ``fp32_head``."""
    wide = 4 if fp32 else size.dtype_bytes
    chunk = min(tokens, chunk_tokens_for(size.vocabulary)) * size.vocabulary
    return chunk * wide + size.vocabulary * size.hidden_size * (wide + size.dtype_bytes)


def generator_memory(config: RunConfig, size: ModelSize) -> Parts:
    """What one generator holds at its peak, which is while it takes up a version, by part.

    The weights are there twice (the version in use and the next), as are the linear layers in the
    layout of CPU kernels; with LoRA its base comes on top. vLLM takes the memory that it is given.
    """
    weights = size.parameters * size.dtype_bytes
    sampling = config.sampling
    length = config.data.max_prompt_length + sampling.max_tokens
    rows = max(config.generators.max_rows, sampling.num_completions)
    parts = {"weights": 2 * weights}
    if planned_engine(config).startswith("vllm"):
        given = config.generators.options.get("kv_cache_memory_bytes")
        parts["KV cache"] = int(given or VLLM_CACHE_BYTES)
    else:
        parts["KV cache"] = rows * length * size.cached
        parts["logits"] = 4 * rows * size.vocabulary * 4
        parts["packed weights"] = 0 if config.ray.gpus.generator else 2 * size.linear
        wide = config.model.fp32_head and size.dtype_bytes < 4
        parts["float32 head"] = 4 * size.vocabulary * size.hidden_size if wide else 0
    parts["adapter's base"] = weights if config.learner.lora else 0
    parts["allocator"] = round(ALLOCATOR_FRAC * sum(parts.values()))
    return parts


def store_memory(config: RunConfig, size: ModelSize) -> Parts:
    """What published versions take: at most two whole ones and as much again in deltas."""
    counted = size.trained if config.learner.lora else size.parameters
    return {"published versions": 3 * counted * size.dtype_bytes}
