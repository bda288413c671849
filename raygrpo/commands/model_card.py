"""The exported model's card: what the model is, how to use it, how it was trained.

The text is `model_card.md`, a template; this module collects the template's values. Models, data
and rewards appear by name: absolute paths of the machine are cut to their last part.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    metadata_load,
    try_to_load_from_cache,
)

from raygrpo.config import RunConfig
from raygrpo.data.sources import BUILDERS, GYM, eval_section, is_on_hub, split_of
from raygrpo.errors import StorageError
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.curve import points
from raygrpo.tracking.files import read_metrics
from raygrpo.tracking.wandb_logger import redacted

TEMPLATE = Path(__file__).with_name("model_card.md")
_FRAMEWORKS = {
    "raygrpo": "raygrpo",
    "Ray": "ray",
    "DeepSpeed": "deepspeed",
    "Transformers": "transformers",
    "Pytorch": "torch",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
}
# The metrics that describe the model. Times and places of the run do not, and may name machines.
_RESULT = re.compile(r"eval/(greedy/)?(reward|accuracy|rewards/.+/mean)|eval/(avg|pass|maj)@\d+")
_METADATA: Mapping[str, Any] = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["generated_from_trainer", "raygrpo", "grpo", "reinforcement-learning"],
}
_NOT_SHOWN = {"run_dir", "ray", "tracking", "generators", "scorers", "checkpoint"}


class Paper(NamedTuple):
    """A method's paper; ``key`` is the BibTeX key."""

    name: str
    arxiv: str
    key: str
    author: str
    title: str

    @property
    def year(self) -> int:
        return 2000 + int(self.arxiv[:2])

    @property
    def link(self) -> str:
        """The title as a Markdown link."""
        return f"[{self.title}](https://arxiv.org/abs/{self.arxiv})"


# fmt: off
_GRPO = Paper("GRPO", "2402.03300", "shao2024deepseekmath", "Zhihong Shao",
              "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models")
_DAPO = Paper("DAPO", "2503.14476", "yu2025dapo", "Qiying Yu",
              "DAPO: An Open-Source LLM Reinforcement Learning System at Scale")
_DR_GRPO = Paper("Dr. GRPO", "2503.20783", "liu2025understanding", "Zichen Liu",
                 "Understanding R1-Zero-Like Training: A Critical Perspective")
_GSPO = Paper("GSPO", "2507.18071", "zheng2025gspo", "Chujie Zheng",
              "Group Sequence Policy Optimization")
_CISPO = Paper("CISPO", "2506.13585", "minimax2025m1", "MiniMax",
               "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention")
_SCALE_RL = Paper("ScaleRL", "2510.13786", "khatri2025scalerl", "Devvrit Khatri",
                  "The Art of Scaling Reinforcement Learning Compute for LLMs")
_DPPO = Paper("DPPO", "2602.04879", "qi2026stablerl", "Penghui Qi",
              "Rethinking the Trust Region in LLM Reinforcement Learning")
_RLOO = Paper("RLOO", "2402.14740", "ahmadian2024rloo", "Arash Ahmadian",
              "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human "
              "Feedback in LLMs")
# fmt: on
_MORE_PAPERS = {
    "default": (_DAPO, _DR_GRPO),
    "dapo": (_DAPO,),
    "dr_grpo": (_DR_GRPO,),
    "gspo": (_GSPO,),
    "scalerl": (_SCALE_RL, _CISPO),
    "dppo": (_DPPO,),
    "rloo": (_RLOO,),
}


def papers_of(recipe: str) -> tuple[Paper, ...]:
    """The papers that a recipe comes from; GRPO's own is always the first."""
    return (_GRPO, *_MORE_PAPERS.get(recipe, ()))


def write_model_card(
    export_dir: Path,
    config: RunConfig,
    run_dir: RunDir,
    *,
    step: int,
    hub_id: str | None = None,
) -> Path:
    """Writes ``README.md`` beside the exported model of ``step``; returns its path.

    The prompt of the quick start is the ``example`` of run.json, text or messages. ``hub_id`` is
    the model's name on the hub, such as ``me/out``; None: the model stays on disk.

    Raises:
        StorageError: run.json or metrics.jsonl cannot be read, or the card cannot be written.
    """
    facts, rows = run_dir.facts, read_metrics(run_dir.metrics_path)
    best, revisions, example = facts.get("best"), facts.get("revisions") or {}, facts["example"]
    base, licence = _base_model(config, facts)
    datasets = _datasets(config)
    name = hub_id.split("/")[1] if hub_id else run_dir.root.name
    data = ModelCardData(
        base_model=base,
        model_name=name,
        license=licence,
        datasets=[source for source, on_hub in datasets.items() if on_hub] or None,
        eval_results=_evaluated(rows, config, step, revisions.get("eval", "")) or None,
        **_METADATA,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base=f"[{base}](https://huggingface.co/{base})" if base.count("/") == 1 else f"`{base}`",
        random_init=config.model.random_init,
        on_datasets=", ".join(
            f"[{source}](https://huggingface.co/datasets/{source})" if on_hub else source
            for source, on_hub in datasets.items()
        ),
        hub_id=hub_id,
        variable="prompt" if isinstance(example, str) else "messages",
        value=repr(example),
        arguments=_arguments(config, example),
        results=_results(rows, step),
        wandb_url=facts.get("wandb_url"),
        papers=papers_of(config.recipe),
        recipe=config.recipe,
        steps=step,
        best_metric=best["metric"] if best and best["step"] == step else None,
        revisions=revisions,
        config_yaml=_shown_config(config).strip(),
        versions=framework_versions(),
    )
    path = export_dir / "README.md"
    try:
        card.save(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    return path


def _arguments(config: RunConfig, example: str | list[Any]) -> str:
    """The arguments of the quick start's call, beside the prompt."""
    text = f"max_new_tokens={config.sampling.max_tokens}, return_full_text=False"
    if config.sampling.stop:
        text += f", stop_sequence={list(config.sampling.stop)!r}"
    chat = {} if isinstance(example, str) else dict(config.data.chat_params)
    return f"{text}, tokenizer_encode_kwargs={chat!r}" if chat else text


def _base_model(config: RunConfig, facts: Mapping[str, Any]) -> tuple[str, str | None]:
    """The base model's name and licence, as far as they are known.

    The name is the hub id; of a local model, the id that its own card names, else its directory.
    """
    path, about = config.model.path, _read_front_matter(config.model.path)
    lineage, licence = about.get("base_model"), about.get("license")
    pinned = str((facts.get("revisions") or {}).get("model", ""))
    # A relative path is no path from another directory: run.json records the path's form.
    local = _is_local(path) or (":" in pinned and "@" not in pinned)
    base = lineage if isinstance(lineage, str) else PurePath(path).name
    return base if local else _name_of(path), licence if isinstance(licence, str) else None


def framework_versions() -> dict[str, str]:
    """The installed versions of the libraries that a run uses."""
    versions = {}
    for shown, package in _FRAMEWORKS.items():
        try:
            versions[shown] = version(package)
        except PackageNotFoundError:
            versions[shown] = "not installed"
    return versions | {"Python": platform.python_version()}


def _datasets(config: RunConfig) -> dict[str, bool]:
    """The names of all sources, and whether each is on the hub."""
    parts = [config.data.source, *(part.source for part in config.data.mixture)]
    return {_name_of(source): is_on_hub(source) for source in map(str, parts) if source}


def _evaluated(
    rows: Sequence[Mapping[str, Any]], config: RunConfig, step: int, pinned: str
) -> list[EvalResult]:
    """The results of the exported step itself, for the hub's own table."""
    values = {n: row[n] for row in rows if row["step"] == step for n in row if _RESULT.fullmatch(n)}
    section = eval_section(config.data, config.eval, seed=config.seed)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_name_of(section.source),
            dataset_name=_name_of(section.source),
            dataset_split=split_of(section) if is_on_hub(section.source) else None,
            dataset_config=section.params.get("name") if is_on_hub(section.source) else None,
            dataset_revision=pinned.partition("@")[2] or None,
            metric_type=name.removeprefix("eval/"),
            metric_name=name,
            metric_value=round(float(value), 6),
        )
        for name, value in values.items()
    ]


def _is_local(path: str) -> bool:
    return Path(path).expanduser().exists()


def _name_of(path: str) -> str:
    """A hub id or reasoning-gym task as it is; of a path, its last part."""
    is_file = PurePath(path).suffix in BUILDERS and not path.startswith(GYM)
    looks_local = path.startswith(("/", "~", "./", "../")) or path.count("/") > 1
    if is_file or looks_local or _is_local(path):
        return Path(path).expanduser().absolute().name
    return path


def _read_front_matter(path: str) -> dict[str, Any]:
    """The front matter of the base model's card, from its directory or the hub's local cache."""
    readme: Any = Path(path).expanduser() / "README.md"
    if not _is_local(path):
        looks_like_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
        readme = try_to_load_from_cache(path, "README.md") if looks_like_id else None
    if not isinstance(readme, (str, Path)) or not Path(readme).is_file():
        return {}
    try:
        return metadata_load(readme) or {}
    except (yaml.YAMLError, ValueError):  # people write cards
        return {}


def _results(rows: list[dict[str, Any]], step: int) -> list[tuple[str, float, float]]:
    """The first and last value of each result up to ``step``, if there are two."""
    rows = [row for row in rows if row["step"] <= step]
    names = sorted({name for row in rows for name in row if _RESULT.fullmatch(name)})
    return [
        (f"`{name}`, step {series[0][0]} and {series[-1][0]}", series[0][1], series[-1][1])
        for name in names
        if len(series := points(rows, name)) > 1
    ]


def _shown_config(config: RunConfig) -> str:
    tree = redacted(config.model_dump(mode="json", exclude_defaults=True, exclude=_NOT_SHOWN))
    for reward in tree.get("rewards", ()):  # where a service runs may name machines
        params = reward.get("params", {})
        params |= {name: "<address>" for name in ("url", "base_url") if name in params}
    text: str = yaml.safe_dump(_without_paths(tree), sort_keys=False, width=100)
    return text


def _without_paths(value: Any) -> Any:
    """A tree of JSON, absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and re.match(r"(/|~|\.\./)[^\s]*$", value):
        return PurePath(value).name
    return value
