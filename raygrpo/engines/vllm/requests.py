"""Between this project's types and vLLM's: engine arguments, sampling parameters, completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import AutoConfig
from vllm import ModelRegistry, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from raygrpo.config import ModelSection, Transport
from raygrpo.engines.stops import StopStrings
from raygrpo.engines.vllm.worker import BACKEND, WorkerExtension
from raygrpo.errors import ConfigError
from raygrpo.types import Completion, FloatArray, Sampling, Version
from raygrpo.weights.probe import PROBE_LENGTH

Run = tuple[Version, int]

# A group shares only full blocks of its prompt. vLLM's default on a CPU is 128 tokens a block, too
# many for prompts of about a hundred. Its CPU kernels need multiples of 32.
CPU_DEFAULTS = {"block_size": 32, "kv_cache_memory_bytes": 2 * 2**30, "enforce_eager": True}


def device_type() -> str:
    """The device of this vLLM: ``cpu``, ``cuda``, or empty."""
    return str(current_platform.device_type)


def unknown_architecture(model: ModelSection) -> str | None:
    """The model's architecture if vLLM lacks it; None if vLLM has it."""
    config = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    names = config.architectures or [config.model_type]
    known = set(ModelRegistry.get_supported_archs())
    return None if known.intersection(names) else ", ".join(names)


def engine_arguments(
    model: ModelSection,
    *,
    seed: int,
    max_rows: int,
    device: str,
    options: Mapping[str, Any],
    transport: Transport = "store",
) -> AsyncEngineArgs:
    """vLLM's arguments: ours, and the user's ``generators.options`` in place of the defaults.

    Raises:
        ConfigError: this vLLM does not have an option, or refuses a value.
    """
    backend = BACKEND if transport == "store" else f"{BACKEND}-{transport}"
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(
            f"generators.options has {', '.join(unknown)}, which vLLM does not know",
            "see the arguments of vllm.AsyncEngineArgs",
        )
    arguments = {
        # -1: as long as the model's positions and the memory allow.
        "max_model_len": -1,
        **(CPU_DEFAULTS if device == "cpu" else {}),
        **options,
        "model": model.path,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "seed": seed % 2**31,
        # A probe's requests never wait for a completion, whose answer waits for the probe.
        "max_num_seqs": max_rows + PROBE_LENGTH - 1,
        "load_format": "dummy" if model.random_init else "auto",
        "generation_config": "vllm",  # stops come with each request
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "weight_transfer_config": {"backend": backend},
    }
    try:
        return AsyncEngineArgs(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses generators.options: {error}") from None


def sampling_params(
    sampling: Sampling, *, seed: int, stop_ids: Sequence[int], num_before: int = 0
) -> SamplingParams:
    """One completion's parameters; ``num_before`` of its tokens are written already."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens - num_before,
        min_tokens=max(0, sampling.min_tokens - num_before),
        seed=seed,
        stop=list(sampling.stop) or None,
        include_stop_str_in_output=True,
        detokenize=bool(sampling.stop),
        stop_token_ids=list(stop_ids),
        ignore_eos=True,  # the end of sequence is one of stop_ids, if it is to stop
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def version_label(version: Version) -> str:
    """vLLM's name of a version, such as ``1.8`` for (1, 8)."""
    return f"{version.incarnation}.{version.step}"


def _read_label(label: str) -> Version:
    """The version behind `version_label`."""
    incarnation, step = label.split(".")
    return Version(int(incarnation), int(step))


def make_completion(
    output: CompletionOutput,
    sampling: Sampling,
    admitted: Version,
    before: Completion | None,
    stops: StopStrings,
    tokenizer: Any,
) -> Completion:
    """The completion of vLLM's tokens, after the tokens of another engine in ``before``.

    vLLM looks for stop strings only in its own tokens after ``min_tokens``. A stop string that
    ended earlier, or that began in ``before``, ends the completion here, as in our other engine.
    """
    written = [] if before is None else before.token_ids.tolist()
    start = len(written)
    tokens = np.array([*written, *output.token_ids], np.int64)
    logprobs = _logprobs(output, sampling)
    if before is not None:
        logprobs = np.concatenate([before.logprobs, logprobs])
    finish = output.finish_reason
    least = max(start + 1, sampling.min_tokens)
    if sampling.stop and least > 1:
        for end in range(least, tokens.size):
            if stops.found(tokens[:end], sampling.stop, whole=end == least):
                tokens, logprobs, finish = tokens[:end], logprobs[:end], "stop"
                break
    runs = _version_runs(output, admitted, tokens.size - start)
    return Completion(
        token_ids=tokens.astype(np.int32),
        logprobs=logprobs,
        loss_mask=np.ones(tokens.size, np.bool_),
        text=tokenizer.decode(tokens.tolist(), skip_special_tokens=True),
        finish=finish,
        version_runs=_joined([*(before.version_runs if before else ()), *runs]) or ((admitted, 0),),
    )


def _version_runs(output: CompletionOutput, admitted: Version, length: int) -> list[Run]:
    """The versions that wrote the first ``length`` tokens, as runs.

    A completion may be admitted under an older version than its first token's. It may have read the
    older version's prompt states, so its first token counts as the older version's.
    """
    spans = output.weight_versions or ()
    runs = [(_read_label(span.version), min(span.end, length) - span.start) for span in spans]
    if runs and runs[0][0] != admitted:
        runs[:1] = [(admitted, 1), (runs[0][0], runs[0][1] - 1)]
    return runs


def _joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    joined: list[Run] = []
    for version, count in runs:
        if count > 0 and joined and joined[-1][0] == version:
            joined[-1] = (version, joined[-1][1] + count)
        elif count > 0:
            joined.append((version, count))
    return tuple(joined)


def _logprobs(output: CompletionOutput, sampling: Sampling) -> FloatArray:
    """Logprobs [C] of the sampled tokens; 0 where sampling is greedy, but NaN stays NaN."""
    found: Any = output.logprobs
    logprobs = np.array(found.logprobs if output.token_ids else [], np.float32)
    return (
        np.where(np.isfinite(logprobs), np.float32(0), np.float32(np.nan))
        if sampling.temperature == 0
        else logprobs
    )
