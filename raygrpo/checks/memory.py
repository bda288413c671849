"""What actors will need of memory, in bytes, from a model's configuration alone: no weights read.

The model is built on torch's meta device, where tensors have shapes and no memory; activations are
what a forward pass there saves for the backward pass. What DeepSpeed, AdamW and the engine hold is
counted by their code. ``tests/parity/test_memory.py`` measures real processes against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raygrpo.algorithm.logprobs import chunk_tokens_for
from raygrpo.algorithm.packing import RowLayout
from raygrpo.config import ModelSection, RunConfig
from raygrpo.engines.select import planned_engine
from raygrpo.learner.deepspeed_config import BUCKET_ELEMENTS
from raygrpo.learner.loading import expected_layout
from raygrpo.models import DTYPES

_ATTENTION = "raygrpo_meta"
# Of a generator's memory and of a GPU's, what the allocator holds between tensors.
ALLOCATOR_FRAC = 0.2
# What vLLM takes where its options say nothing: for its cache on a CPU, of the device on a GPU.
VLLM_CACHE_BYTES = 2 * 2**30
VLLM_GPU_SHARE = 0.9
# A CUDA context with its kernels.
_CONTEXT_BYTES = 2**29
# Measured on CPUs, with a heap that is kept: what malloc holds between the tensors of a training
# step, as a share of what a forward pass saves without recomputation; in an update of one
# microbatch, of more. An adapter's layers make and free more on the way.
_HOLES = (0.8, 1.0)
_ADAPTER_HOLES = (1.1, 1.9)
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
class Memory:
    """What one process needs by part, in bytes; without a GPU all of it is the host's.

    ``gpu_share`` is of a device, taken whatever the parts there add up to (vLLM's utilisation).
    """

    host: Parts
    gpu: Parts = field(default_factory=dict)
    gpu_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FullUpdate:
    """A rank's update when prompts and completions have all their tokens.

    ``tokens`` are of its fullest microbatch and ``longest`` of its longest row. ``copied`` are the
    prompt tokens that attention by segment copies in a microbatch, once a completion; ``mask`` the
    elements of masks over whole rows.
    """

    microbatches: int
    tokens: int
    longest: int
    copied: int = 0
    mask: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What is counted of a model.

    ``activations`` are bytes a token that one forward pass keeps, ``hidden`` those of one layer's
    input, ``cached`` those of a token's keys and values in all layers, and ``expanded`` the same
    with as many heads as queries have. ``linear`` are the bytes of linear layers, ``largest`` the
    elements of the largest parameter. ``layout`` is what the learner's rows may hold.
    """

    parameters: int
    trained: int
    largest: int
    linear: int
    dtype_bytes: int
    activations: int
    hidden: int
    cached: int
    expanded: int
    layers: int
    vocabulary: int
    hidden_size: int
    layout: RowLayout


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
        expanded=2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        hidden_size=text.hidden_size,
        layout=expected_layout(text),
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
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return output.transpose(1, 2).contiguous(), None


def learner_memory(config: RunConfig, size: ModelSize, update: FullUpdate) -> Memory:
    """What one rank holds at its peak, the process itself left out.

    ``loading`` is what the start takes beyond training, always on the host: each rank loads the
    whole model, and probes bfloat16 by a copy in float32.
    """
    parts = _training_parts(config, size, update)
    held = size.parameters * size.dtype_bytes
    loading = held + max(4 * size.parameters if size.dtype_bytes < 4 else 0, parts["reference"])
    if not config.ray.gpus.learner:
        return Memory(host=_completed(parts, config, size, loading=loading))
    away = _offloaded(config)
    gpu = {name: value for name, value in parts.items() if name not in away}
    host = {name: value for name, value in parts.items() if name in away}
    gpu = _with_allocator(gpu | {"context": _CONTEXT_BYTES})
    return Memory(
        host=_completed(host, config, size, loading=loading), gpu=_completed(gpu, config, size)
    )


def _training_parts(config: RunConfig, size: ModelSize, update: FullUpdate) -> Parts:
    section, stage, num_ranks = config.learner, config.learner.zero_stage, config.learner.num_ranks
    shard = _shard(config, size)
    held = size.parameters * size.dtype_bytes
    tokens = update.tokens // section.sequence_parallel
    away = _offloaded(config)
    activations = _activation_bytes(config, size, tokens, update)
    gradients = _gradients(stage, size, shard)
    alone = update.microbatches == 1 and num_ranks == 1
    if alone and stage in (1, 2) and "gradients" not in away:
        # Those of the only microbatch grow as its activations go; among ranks they are summed in
        # flat copies, which the holes that activations leave are too small for.
        gradients = max(0, gradients - activations)
    # A reference that moves is averaged in float32.
    average = 4 * size.parameters if section.reference.sync_steps and size.dtype_bytes < 4 else 0
    parts = {
        "parameters": held if stage < 3 else held // num_ranks,
        "gathered": _gathered(config, size) if stage == 3 else 0,
        "master weights": shard if stage or size.dtype_bytes < 4 else 0,
        "gradients": gradients,
        "optimizer": 2 * shard,
        "reduce buckets": _bucket_bytes(config, size),
        "activations": activations,
        "attention masks": update.mask * size.dtype_bytes,
        "language head": _head_bytes(config, size, tokens),
        "reference": held + average if config.loss.beta and not section.lora else 0,
    }
    if not config.ray.gpus.learner:
        holes = _ADAPTER_HOLES if section.lora else _HOLES
        share = holes[update.microbatches > 1]
        parts["allocator"] = round(share * _saved_bytes(config, size, tokens, update))
    if "optimizer" in away:
        # Beside float32 gradients, stages 1 and 2 keep the weights' next values and what earlier
        # microbatches gave, in the model's dtype; stage 3 keeps a sum of its own.
        copies = 1 + (update.microbatches > 1)
        low = copies * shard // 4 + 2 * size.largest
        parts["offload buffers"] = shard if stage == 3 else low * size.dtype_bytes
    return parts


def _completed(parts: Parts, config: RunConfig, size: ModelSize, *, loading: int = 0) -> Parts:
    """Parts of one memory with what other moments take beyond them.

    AdamW's temporaries, of a rank's flat shard, come when activations are gone; what is that large
    is taken from the system and given back at once.
    """
    if "optimizer" in parts:
        shard = _shard(config, size)
        kept = ("parameters", "gathered", "master weights", "optimizer", "reference")
        step = sum(parts.get(name, 0) for name in (*kept, "offload buffers", "context"))
        step += min(shard, parts["gradients"])
        step += 2 * (shard if config.learner.zero_stage else 4 * size.largest)
        parts["optimizer step"] = max(0, step - sum(parts.values()))
    return parts | {"loading": max(0, loading - sum(parts.values()))}


def _shard(config: RunConfig, size: ModelSize) -> int:
    """Bytes of a rank's trained parameters in float32."""
    return 4 * size.trained // (config.learner.num_ranks if config.learner.zero_stage else 1)


def _gradients(stage: int, size: ModelSize, shard: int) -> int:
    """Stage 0 has a gradient a weight, and in bfloat16 a float32 one for the masters; stage 1 sums
    them whole in float32; the others keep their shard."""
    if stage == 0:
        return size.trained * (4 if size.dtype_bytes == 4 else 2 + 4)
    return 4 * size.trained if stage == 1 else shard


def _zero(config: RunConfig) -> Mapping[str, Any]:
    zero: Mapping[str, Any] = config.learner.deepspeed.get("zero_optimization", {})
    return zero


def _offloaded(config: RunConfig) -> frozenset[str]:
    """The parts that DeepSpeed's offload keeps in the host's memory."""

    def on_cpu(section: str) -> bool:
        given = _zero(config).get(section) or {}
        return bool(given.get("device", "none") == "cpu")

    stage = config.learner.zero_stage
    names: set[str] = set()
    if stage and on_cpu("offload_optimizer"):
        names |= {"master weights", "gradients", "optimizer", "offload buffers"}
    if stage == 3 and on_cpu("offload_param"):
        names.add("parameters")
    return frozenset(names)


def _bucket_bytes(config: RunConfig, size: ModelSize) -> int:
    """What is on its way between ranks, in float32 but for weights.

    Among ranks, a bucket of gradients is copied to be summed; stage 3 gets its share beside it, and
    gathers weights in one tensor before it cuts them apart.
    """
    stage, ranks, zero = config.learner.zero_stage, config.learner.num_ranks, _zero(config)
    if not stage:
        return 0
    elements = min(int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS)), size.trained)
    if ranks == 1:
        return 4 * elements
    if stage < 3:
        return 4 * 2 * elements
    prefetched = min(int(zero.get("stage3_prefetch_bucket_size", BUCKET_ELEMENTS)), size.parameters)
    return 4 * (2 * elements + elements // ranks) + prefetched * size.dtype_bytes


def _gathered(config: RunConfig, size: ModelSize) -> int:
    """Whole parameters that ZeRO-3 keeps between their uses."""
    live = int(_zero(config).get("stage3_max_live_parameters", 10**9))
    return min(live, size.parameters) * size.dtype_bytes


def _saved_bytes(config: RunConfig, size: ModelSize, tokens: int, update: FullUpdate) -> int:
    """What a forward pass keeps without recomputation; on a GPU keys and values for each head."""
    if not config.ray.gpus.learner:
        return tokens * size.activations + update.copied * size.cached
    repeated = size.expanded - size.cached
    return tokens * (size.activations + repeated) + update.copied * size.expanded


def _activation_bytes(config: RunConfig, size: ModelSize, tokens: int, update: FullUpdate) -> int:
    total = _saved_bytes(config, size, tokens, update)
    if not config.learner.gradient_checkpointing:
        return total
    return tokens * size.layers * size.hidden + total // size.layers


def _head_bytes(config: RunConfig, size: ModelSize, tokens: int) -> int:
    """A chunk's logits; of a head that is trained its gradient's sum, and a second one: the sum
    rounded, or the embedding's before the two are added up."""
    width = 4 if config.model.fp32_head else size.dtype_bytes
    chunk = min(tokens, chunk_tokens_for(size.vocabulary)) * size.vocabulary
    # A GPU takes a chunk's softmax at once, in float32; a CPU in blocks of a few megabytes.
    softmax = 2 * 4 * chunk if config.ray.gpus.learner else 0
    sums = 0 if config.learner.lora else size.vocabulary * size.hidden_size
    return chunk * width + softmax + sums * (width + size.dtype_bytes)


def generator_memory(config: RunConfig, size: ModelSize) -> Memory:
    """What one generator holds at its peak, which is while it takes up a version.

    The host has the weights twice, the version in use and the next; a CPU's tensors are views of
    them, a GPU has as much again. The linear layers are there twice in the layout of CPU kernels,
    and with LoRA its base comes on top.
    """
    if planned_engine(config).engine == "vllm":
        return _vllm_memory(config, size)
    weights = size.parameters * size.dtype_bytes
    length = config.data.max_prompt_length + config.sampling.max_tokens
    rows = max(config.generators.max_rows, config.sampling.num_completions)
    versions = {"weights": 2 * weights, "adapter's base": weights if config.learner.lora else 0}
    decoding = {
        "KV cache": rows * length * size.cached,
        "logits": 4 * rows * size.vocabulary * 4,
    }
    if config.model.fp32_head and size.dtype_bytes < 4:
        decoding["float32 head"] = 4 * size.vocabulary * size.hidden_size
    if config.ray.gpus.generator:
        gpu = {"weights": 2 * weights, **decoding, "context": _CONTEXT_BYTES}
        return Memory(host=_with_allocator(versions), gpu=_with_allocator(gpu))
    packed = {"packed weights": 2 * size.linear}
    return Memory(host=_with_allocator(versions | decoding | packed))


def _vllm_memory(config: RunConfig, size: ModelSize) -> Memory:
    """Beside the two versions, vLLM's own weights and the next ones in shared memory.

    On a GPU it takes its share of the device, the cache what the weights leave of it; the cache
    then counts as one row. Tensor parallelism divides what a device has.
    """
    options, weights = config.generators.options, size.parameters * size.dtype_bytes
    given = options.get("kv_cache_memory_bytes")
    versions = {"weights": 3 * weights, "adapter's base": weights if config.learner.lora else 0}
    if not config.ray.gpus.generator:
        own = {"engine's weights": weights, "KV cache": int(given or VLLM_CACHE_BYTES)}
        return Memory(host=_with_allocator(versions | own))
    devices = int(options.get("tensor_parallel_size", 1))
    row = (config.data.max_prompt_length + config.sampling.max_tokens) * size.cached
    share = 0.0 if given else float(options.get("gpu_memory_utilization", VLLM_GPU_SHARE))
    gpu = {"weights": weights // devices, "KV cache": int(given or row // devices)}
    return Memory(host=_with_allocator(versions), gpu=gpu, gpu_share=share)


def _with_allocator(parts: Parts) -> Parts:
    return parts | {"allocator": round(ALLOCATOR_FRAC * sum(parts.values()))}


def store_memory(config: RunConfig, size: ModelSize) -> Memory:
    """What published versions take: at most two whole ones and as much again in deltas."""
    counted = size.trained if config.learner.lora else size.parameters
    return Memory(host={"published versions": 3 * counted * size.dtype_bytes})
