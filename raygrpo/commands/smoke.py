"""Two steps of the real configuration on a tiny model of the same architecture."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from raygrpo.actors.cluster.placement import address_of
from raygrpo.config import ModelSection, RunConfig
from raygrpo.config.file import merged_sections
from raygrpo.models import load_tokenizer, quiet_transformers
from raygrpo.storage.run_dir import RunDir

STEPS, GROUPS, MAX_TOKENS, EVAL_PROMPTS = 2, 2, 16, 4
_HEADS, _HEAD_DIM, _LAYERS = 4, 16, 2
# Sizes of mixtures of experts, by the names that models give them.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")


@contextlib.contextmanager
def smoke_run(config: RunConfig, say: Callable[[str], Any]) -> Iterator[RunConfig]:
    """The configuration of a smoke run, in a directory that is removed at the end.

    ``say`` gets a line for each key that differs from the real run. On a cluster the directory lies
    beside the run's own directory, which all nodes see.

    Raises:
        ConfigError: the model's configuration or tokenizer does not load.
    """
    shared = next(path for path in RunDir.at(config).root.parents if path.is_dir())
    parent = None if address_of(config) == "local" else shared
    with tempfile.TemporaryDirectory(prefix="raygrpo-smoke-", dir=parent) as directory:
        model = save_tiny_twin(config.model, Path(directory) / "model")
        changes = smoke_changes(config)
        say(f"smoke run in {directory}; changed:")
        for section, keys in changes.items():
            for name, value in keys.items():
                say(f"  {section}.{name}: {value}")
        say(f"  model: {model}, random weights, the real tokenizer and vocabulary")
        twin = {"path": str(Path(directory) / "model"), "revision": None, "random_init": True}
        changes |= {"run_dir": str(Path(directory) / "run"), "model": twin}
        whole = merged_sections(config.model_dump(), changes)
        yield RunConfig.model_validate(whole)


def smoke_changes(config: RunConfig) -> dict[str, Any]:
    """The keys that a smoke run changes, by section, beside model and directory."""
    train, sampling, filters = config.train, config.sampling, config.sampling.filters.model_dump()
    # Refill is off, since random completions rarely earn a reward: a step that is refilled for
    # ever, or skipped, would not try the learner.
    changes: dict[str, Any] = {
        "train": {
            "steps": min(train.steps, STEPS),
            "groups_per_step": max(train.num_minibatches, GROUPS - GROUPS % train.num_minibatches),
            "dynamic_sampling": False,
        },
        "sampling": {
            "max_tokens": min(sampling.max_tokens, MAX_TOKENS),
            "filters": {**filters, "min_tokens": min(filters["min_tokens"], MAX_TOKENS)},
        },
        "tracking": {"wandb": "disabled"},
    }
    if config.eval.eval_steps:
        number = min(config.eval.num_prompts, EVAL_PROMPTS)
        best = {"metric": config.eval.best.metric, "patience": 0}
        changes["eval"] = {"eval_steps": STEPS, "num_prompts": number, "best": best}
    if config.checkpoint.save_steps:
        changes["checkpoint"] = {"save_steps": 1}
    before = config.model_dump()
    kept = {
        section: {k: value for k, value in keys.items() if before[section][k] != value}
        for section, keys in changes.items()
    }
    return {section: keys for section, keys in kept.items() if keys}


def save_tiny_twin(model: ModelSection, directory: Path) -> str:
    """Writes configuration and tokenizer of a tiny model like ``model``; describes it.

    Raises:
        ConfigError: the model's tokenizer does not load.
    """
    load_tokenizer(model).save_pretrained(directory)
    real = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    with quiet_transformers():
        tiny = shrunk(real)
        tiny.save_pretrained(directory)
        with contextlib.suppress(OSError):  # the model's own configuration serves too
            stops = GenerationConfig.from_pretrained(model.path, revision=model.revision)
            stops.save_pretrained(directory)
    text = tiny.get_text_config()
    return (
        f"{text.model_type} with {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"{text.num_attention_heads} heads"
    )


def shrunk(config: Any) -> Any:
    """The same kind of transformers configuration, tiny; vocabulary, ties and layer types stay."""
    text = config.get_text_config()
    changes = _sizes(text)
    tree = config.to_dict()
    if text is config:
        return type(config).from_dict({**tree, **changes})
    inner = next(name for name in config.sub_configs if getattr(config, name) is text)
    return type(config).from_dict({**tree, inner: {**tree[inner], **changes}})


def _sizes(text: Any) -> dict[str, Any]:
    tree = text.to_dict()
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if not _holds_lists(tree.get("rope_parameters")):  # lists are as long as a head is wide
        head_dim = min(head_dim, _HEAD_DIM)
    width = _HEADS * head_dim
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1 if shared == 1 else _HEADS if shared == heads else _HEADS // 2,
        "head_dim": head_dim,
        **dict.fromkeys(_EXPERTS, 4),
        **dict.fromkeys(_EXPERT_WIDTHS, width),
        "num_experts_per_tok": 2,
    }
    sizes = {name: value for name, value in sizes.items() if tree.get(name) is not None}
    layers = _representatives(text)
    for name, value in tree.items():  # a list with an item for each layer
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            sizes[name] = [value[layer] for layer in layers]
    return {**sizes, "num_hidden_layers": len(layers)}


def _representatives(text: Any) -> list[int]:
    """One layer of each kind, and two at least where there are two."""
    kinds = list(getattr(text, "layer_types", None) or ())
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    others = [layer for layer in range(text.num_hidden_layers) if layer not in first]
    return sorted([*first, *others[: max(0, _LAYERS - len(first))]])


def _holds_lists(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_lists(item) for item in value.values())
    return isinstance(value, (list, tuple))
