"""The options that the project sets in vLLM, and the question whether vLLM can be used here.

Importing this module imports no vLLM; `vllm_problem` does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Final

from raygrpo.config import ModelSection

NOT_INSTALLED: Final = "vLLM is not installed"


# Options that the project sets itself and relies on; a user cannot set them.
OURS: Final = frozenset(
    {
        "model", "revision", "tokenizer", "tokenizer_revision", "tokenizer_mode", "dtype", "seed",
        "skip_tokenizer_init", "trust_remote_code", "max_num_seqs", "load_format", "logprobs_mode",
        "generation_config", "disable_log_stats", "worker_extension_cls", "weight_transfer_config",
        "data_parallel_size",
    }
)  # fmt: skip


# setdefault: a variable that the user has set stays as it is.
_ENVIRONMENT: Final = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a generator shares its machine with other actors
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def is_installed() -> bool:
    """Whether there is a vLLM to import."""
    return find_spec("vllm") is not None


def vllm_problem(device: str, model: ModelSection | None = None) -> str | None:
    """Why vLLM cannot be used in this process on ``device`` (cpu or cuda); None if it can.

    A ``model`` must have an architecture that vLLM implements itself. If vLLM is installed, the
    question imports it, which takes seconds.
    """
    if not is_installed():
        return NOT_INSTALLED
    try:
        _prepare()
        # It imports vLLM, which may fail in many ways.
        from raygrpo.engines.vllm import requests

        built_for = requests.device_type()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = (str(error).splitlines() or [""])[0]
        return f"vLLM does not import: {type(error).__name__}: {first}"
    if built_for != device:
        return f"vLLM computes on {built_for or 'nothing'} here"
    unknown = requests.unknown_architecture(model) if model is not None else None
    return f"vLLM does not have {unknown}" if unknown else None


def _prepare() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
