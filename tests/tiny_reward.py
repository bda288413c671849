"""A tiny random reward model: a sequence classifier with the character-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from raygrpo.models import quiet_transformers
from tests.tiny import Kind, tiny_config, tiny_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def save_tiny_reward_model(
    directory: Path | str, kind: Kind = "llama", *, num_labels: int = 1, seed: int = 0
) -> Path:
    """Saves a classifier whose logits differ widely between texts; returns the directory."""
    from transformers import AutoModelForSequenceClassification

    path = Path(directory)
    config = tiny_config(kind)
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.25)
    with quiet_transformers():
        model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path
