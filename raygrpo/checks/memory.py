"""The tensors that each actor will hold, in bytes, from a model's configuration alone.

No weights are read: the model is built on torch's meta device, where tensors have shapes and no
memory. The activations are what a forward pass there saves for the backward pass. The tensors of
DeepSpeed, AdamW and the engine are counted by their code.

Only tensors are counted. Python, libraries, a CUDA context and the gaps of an allocator come on
top. ``tests/parity/test_memory.py`` holds the sums to 20 % of the tensors of real processes.
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
# vLLM's defaults: bytes of its cache on a CPU, its share of a GPU.
VLLM_CACHE_BYTES = 2 * 2**30
VLLM_GPU_SHARE = 0.9
Parts = dict[str, int]
# Tokens of the forward pass that activations are counted on; they grow in proportion.
_COUNTED_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The tensors of one process by part, in bytes, such as ``{"weights": 4_000_000}``.

    Without a GPU all parts are the host's. ``gpu_share`` is the share of a device that vLLM takes,
    whatever the parts add up to; 0 if the parts are all.
    """

    host: Parts
    gpu: Parts = field(default_factory=dict)
    gpu_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FullUpdate:
    """A rank's update when prompts and completions have full length.

    ``tokens`` counts the fullest microbatch, ``longest`` the longest row. Attention by segment
    copies ``copied`` prompt tokens in a microbatch, each once a completion. ``mask`` counts the
    elements of masks over whole rows.
    """

    microbatches: int
    tokens: int
    longest: int
    copied: int = 0
    mask: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The sizes of a model that an estimate needs.

    Counts of parameters: ``parameters``, ``trained`` and ``largest`` (of one tensor). Bytes a
    token: ``activations`` (what a forward pass saves), ``hidden`` (one layer's input), ``cached``
    (keys and values of all layers), ``expanded`` (the same, with a key head for each query head).
    ``linear``: bytes of all linear layers. ``layout``: how the learner may fill rows.
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
    """The sizes of a model; ``lora`` holds peft's arguments, or nothing.

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
    """Bytes that a forward pass of one row saves; each storage counts once, parameters do not."""
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
    """Attention that saves the tensors that fused kernels save: inputs, output, log-sum-exps."""
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return output.transpose(1, 2).contiguous(), None


def learner_memory(config: RunConfig, size: ModelSize, update: FullUpdate) -> Memory:
    """The tensors of one rank at their peak.

    The part ``loading`` is the start's need beyond that of training, always on the host: each rank
    loads the whole model, and probes bfloat16 by a copy in float32.
    """
    parts = _training_parts(config, size, update)
    held = size.parameters * size.dtype_bytes
    loading = held + max(4 * size.parameters if size.dtype_bytes < 4 else 0, parts["reference"])
    if not config.ray.gpus.learner:
        return Memory(host=_completed(parts, config, size, loading=loading))
    away = _offloaded(config)
    gpu = {name: value for name, value in parts.items() if name not in away}
    host = {name: value for name, value in parts.items() if name in away}
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
        # The gradients of an only microbatch grow while its activations are freed.
        gradients = max(0, gradients - activations)
    # Whole parameters that ZeRO-3 keeps between their uses.
    live = int(_zero(config).get("stage3_max_live_parameters", 10**9))
    # A reference that moves is averaged in float32.
    average = 4 * size.parameters if section.reference.sync_steps and size.dtype_bytes < 4 else 0
    parts = {
        "parameters": held if stage < 3 else held // num_ranks,
        "gathered": min(live, size.parameters) * size.dtype_bytes if stage == 3 else 0,
        "master weights": shard if stage or size.dtype_bytes < 4 else 0,
        "gradients": gradients,
        "optimizer": 2 * shard,
        "reduce buckets": _bucket_bytes(config, size),
        "activations": activations,
        "attention masks": update.mask * size.dtype_bytes,
        "language head": _head_bytes(config, size, tokens),
        "reference": held + average if config.loss.beta and not section.lora else 0,
    }
    if "optimizer" in away:
        # Beside float32 gradients, stages 1 and 2 keep the weights' next values and what earlier
        # microbatches gave, in the model's dtype; stage 3 keeps a sum of its own.
        copies = 1 + (update.microbatches > 1)
        low = copies * shard // 4 + 2 * size.largest
        parts["offload buffers"] = shard if stage == 3 else low * size.dtype_bytes
    return parts


def _completed(parts: Parts, config: RunConfig, size: ModelSize, *, loading: int = 0) -> Parts:
    """``parts``, with the need of other moments than the backward pass beyond them.

    AdamW's temporaries are as large as a rank's shard, and live when the activations are gone.
    """
    if "optimizer" in parts:
        shard = _shard(config, size)
        kept = ("parameters", "gathered", "master weights", "optimizer", "reference")
        step = sum(parts.get(name, 0) for name in (*kept, "offload buffers"))
        step += min(shard, parts["gradients"])
        step += 2 * (shard if config.learner.zero_stage else 4 * size.largest)
        parts["optimizer step"] = max(0, step - sum(parts.values()))
    return parts | {"loading": max(0, loading - sum(parts.values()))}


def _shard(config: RunConfig, size: ModelSize) -> int:
    """Bytes of a rank's trained parameters in float32."""
    return 4 * size.trained // (config.learner.num_ranks if config.learner.zero_stage else 1)


def _gradients(stage: int, size: ModelSize, shard: int) -> int:
    """Bytes of gradients.

    Stage 0 has one gradient a weight, and in bfloat16 a float32 one for each master weight. Stage 1
    sums all gradients in float32. Stages 2 and 3 keep a shard.
    """
    if stage == 0:
        return size.trained * (4 if size.dtype_bytes == 4 else 2 + 4)
    return 4 * size.trained if stage == 1 else shard


def _zero(config: RunConfig) -> dict[str, Any]:
    return config.learner.deepspeed.get("zero_optimization") or {}


def _offloaded(config: RunConfig) -> set[str]:
    """The parts that DeepSpeed's offload keeps in the host's memory."""
    stage, zero = config.learner.zero_stage, _zero(config)
    names: set[str] = set()
    if stage and (zero.get("offload_optimizer") or {}).get("device") == "cpu":
        names |= {"master weights", "gradients", "optimizer", "offload buffers"}
    if stage == 3 and (zero.get("offload_param") or {}).get("device") == "cpu":
        names.add("parameters")
    return names


def _bucket_bytes(config: RunConfig, size: ModelSize) -> int:
    """Bytes of the buckets between ranks, in float32 but for weights.

    DeepSpeed allocates a whole bucket, of which a CPU touches the used elements alone. Several
    ranks sum a copy of them. Stage 3 adds a rank's share of the sum, and gathers weights in one
    tensor.
    """
    stage, ranks, zero = config.learner.zero_stage, config.learner.num_ranks, _zero(config)
    if not stage:
        return 0
    bucket = int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    used = min(bucket, size.trained)
    allocated = 4 * (bucket if config.ray.gpus.learner else used)
    if ranks == 1:
        return allocated
    if stage < 3:
        return allocated + 4 * used
    prefetched = min(int(zero.get("stage3_prefetch_bucket_size", BUCKET_ELEMENTS)), size.parameters)
    return allocated + 4 * (used + used // ranks) + prefetched * size.dtype_bytes


def _activation_bytes(config: RunConfig, size: ModelSize, tokens: int, update: FullUpdate) -> int:
    """What a forward pass saves; a GPU repeats keys for each query head."""
    if config.ray.gpus.learner:
        repeated = size.expanded - size.cached
        total = tokens * (size.activations + repeated) + update.copied * size.expanded
    else:
        total = tokens * size.activations + update.copied * size.cached
    if not config.learner.gradient_checkpointing:
        return total
    return tokens * size.layers * size.hidden + total // size.layers


def _head_bytes(config: RunConfig, size: ModelSize, tokens: int) -> int:
    """A chunk's logits and, if the head is trained, two sums of its gradient.

    The second sum is the rounded first one, or the embedding's before both are added.
    """
    width = 4 if config.model.fp32_head else size.dtype_bytes
    chunk = min(tokens, chunk_tokens_for(size.vocabulary)) * size.vocabulary
    # A GPU takes a chunk's softmax at once, in float32; a CPU in blocks of a few megabytes.
    softmax = 2 * 4 * chunk if config.ray.gpus.learner else 0
    sums = 0 if config.learner.lora else size.vocabulary * size.hidden_size
    return chunk * width + softmax + sums * (width + size.dtype_bytes)


def generator_memory(config: RunConfig, size: ModelSize) -> Memory:
    """The peak of one generator, which is while it takes up a new version beside the one in use.

    The host has both versions; a CPU's tensors are views of them, a GPU has as much again. CPU
    kernels have the linear layers in a layout of their own. With LoRA the base weights come on top.
    """
    if planned_engine(config).engine == "vllm":
        return _vllm_memory(config, size)
    weights = size.parameters * size.dtype_bytes
    length = config.data.max_prompt_length + config.sampling.max_tokens
    rows = max(config.generators.max_rows, config.sampling.num_completions)
    base = weights if config.learner.lora else 0
    versions = {"weights": weights, "next version": weights, "adapter's base": base}
    decoding = {
        "KV cache": rows * length * size.cached,
        "logits": 4 * rows * size.vocabulary * 4,
    }
    if config.model.fp32_head and size.dtype_bytes < 4:
        decoding["float32 head"] = 4 * size.vocabulary * size.hidden_size
    if config.ray.gpus.generator:
        gpu = {"weights": weights, "next version": weights, **decoding}
        return Memory(host=versions, gpu=gpu)
    versions["next version"] += size.linear
    return Memory(host={**versions, "packed weights": size.linear, **decoding})


def _vllm_memory(config: RunConfig, size: ModelSize) -> Memory:
    """The two versions, vLLM's own weights, and the next weights in shared memory.

    On a GPU vLLM takes a share of the device, and its cache takes what the weights leave: the
    cache then counts as one row. Tensor parallelism divides the tensors of a device.
    """
    options, weights = config.generators.options, size.parameters * size.dtype_bytes
    given = options.get("kv_cache_memory_bytes")
    versions = {"weights": 3 * weights, "adapter's base": weights if config.learner.lora else 0}
    if not config.ray.gpus.generator:
        own = {"engine's weights": weights, "KV cache": int(given or VLLM_CACHE_BYTES)}
        return Memory(host=versions | own)
    devices = int(options.get("tensor_parallel_size", 1))
    row = (config.data.max_prompt_length + config.sampling.max_tokens) * size.cached
    share = 0.0 if given else float(options.get("gpu_memory_utilization", VLLM_GPU_SHARE))
    gpu = {"weights": weights // devices, "KV cache": int(given or row // devices)}
    return Memory(host=versions, gpu=gpu, gpu_share=share)


def store_memory(config: RunConfig, size: ModelSize) -> Memory:
    """The published versions: at most two whole ones, and deltas of one more's size."""
    counted = size.trained if config.learner.lora else size.parameters
    return Memory(host={"published versions": 3 * counted * size.dtype_bytes})
