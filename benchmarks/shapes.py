"""What is measured: workloads, and models of a known shape with random weights."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of Qwen2.5's 0.5B and 1.5B; "tiny" is for smoke runs, "small" has heads of 64, which vLLM wants.
SHAPES = {
    "tiny": (32, 64, 2, 4, 2, 512),
    "small": (256, 512, 2, 4, 2, 512),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of a step: prompts, completions of each, and tokens of either."""

    model: str
    prompts: int
    completions: int
    prompt_tokens: int
    new_tokens: int


SMOLLM2, GEMMA = "weights/smollm2-135m", "weights/gemma-3-270m"
WORKLOADS = {
    "smollm2": Workload(SMOLLM2, prompts=4, completions=8, prompt_tokens=105, new_tokens=64),
    "long_prompt": Workload(SMOLLM2, prompts=2, completions=16, prompt_tokens=256, new_tokens=32),
    "gemma": Workload(GEMMA, prompts=4, completions=8, prompt_tokens=12, new_tokens=32),
}


def save_shape(name: str, directory: Path | str, *, dtype: str = "bfloat16") -> Path:
    """Saves a model of one of `SHAPES`, weights drawn from seed 0, with a character tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from raygrpo.models import quiet_transformers
    from tests.tiny import tiny_tokenizer

    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[name]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    path = Path(directory)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def model_directory(name: str | None, default: str, work: Path | str | None = None) -> str:
    """The absolute directory of a model that is named by its directory or its shape.

    Shapes are saved in a new directory inside ``work``.
    """
    if name in SHAPES:
        return str(save_shape(name, tempfile.mkdtemp(prefix=f"{name}-", dir=work)))
    return str(Path(name or ROOT / default).resolve())
