"""The exported model's card: what it is, how to use it, how it came about."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from raygrpo.config import RunConfig
from raygrpo.data.sources import BUILDERS, GYM
from raygrpo.errors import StorageError
from raygrpo.run_dir import RunDir
from raygrpo.tracking.curve import points
from raygrpo.tracking.files import read_metrics
from raygrpo.tracking.wandb_logger import redacted

Example = str | Sequence[Mapping[str, Any]]

_FRAMEWORKS = {
    "raygrpo": "raygrpo",
    "Ray": "ray",
    "DeepSpeed": "deepspeed",
    "Transformers": "transformers",
    "PyTorch": "torch",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
}
_BADGE = "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg"
# Where and how fast a run ran says nothing about the model, and may name machines.
_NOT_SHOWN = ("run_dir", "ray", "tracking", "generators", "scorers", "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A method's paper; ``key`` is its BibTeX key."""

    key: str
    name: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def link(self) -> str:
        """Its title as a Markdown link."""
        return f"[{self.title}](https://arxiv.org/abs/{self.arxiv})"

    @property
    def bibtex(self) -> str:
        """Its BibTeX entry."""
        return (
            f"@article{{{self.key},\n    title = {{{{{self.title}}}}},\n"
            f"    author = {{{self.authors}}},\n    year = {{{self.year}}},\n"
            f"    eprint = {{arXiv:{self.arxiv}}}\n}}"
        )


_GRPO = Paper(
    key="shao2024deepseekmath",
    name="GRPO",
    title=("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"),
    authors=(
        "Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and "
        "Mingchuan Zhang and Y. K. Li and Y. Wu and Daya Guo"
    ),
    year=2024,
    arxiv="2402.03300",
)
_DAPO = Paper(
    key="yu2025dapo",
    name="DAPO",
    title="DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    authors="Qiying Yu and Zheng Zhang and Ruofei Zhu and others",
    year=2025,
    arxiv="2503.14476",
)
_DR_GRPO = Paper(
    key="liu2025understanding",
    name="Dr. GRPO",
    title="Understanding R1-Zero-Like Training: A Critical Perspective",
    authors=(
        "Zichen Liu and Changyu Chen and Wenjun Li and Penghui Qi and Tianyu Pang and Chao Du and "
        "Wee Sun Lee and Min Lin"
    ),
    year=2025,
    arxiv="2503.20783",
)
_PAPERS: Mapping[str, tuple[Paper, ...]] = {
    "default": (_GRPO, _DAPO, _DR_GRPO),
    "dapo": (_GRPO, _DAPO),
    "dr_grpo": (_GRPO, _DR_GRPO),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says. No path of the machine belongs in any of it.

    ``base_model``: hub id, or the directory's name. ``results``: (what, before, after) of the
    evaluation's metrics. ``example``: a prompt for the quick start, text or messages.
    """

    base_model: str
    model_name: str
    dataset_name: str
    dataset_is_on_hub: bool
    random_init: bool
    licence: str | None
    wandb_url: str | None
    recipe: str
    config_yaml: str
    steps: int
    max_new_tokens: int
    stop: tuple[str, ...]
    example: Example
    results: tuple[tuple[str, float, float], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def card_facts(
    config: RunConfig,
    root: Path,
    *,
    step: int,
    tokenizer: Any,
    example: Example | None = None,
) -> CardFacts:
    """The facts of the run in ``root`` after ``step`` steps; ``example`` is a prompt to show.

    Raises:
        StorageError: run.json or metrics.jsonl cannot be read.
    """
    run_dir = RunDir(root)
    chat = getattr(tokenizer, "chat_template", None) is not None and config.data.chat is not False
    if example is None:
        asked = "What is 3 plus 4?"
        example = [{"role": "user", "content": asked}] if chat else f"Question: {asked}\nAnswer:"
    source = config.data.source
    about_base = _read_front_matter(config.model.path)
    lineage = about_base.get("base_model")
    licence = about_base.get("license")
    return CardFacts(
        base_model=lineage
        if isinstance(lineage, str) and _is_local(config.model.path)
        else _name_of(config.model.path),
        model_name=config.tracking.name or root.name,
        dataset_name=_name_of(source),
        dataset_is_on_hub=not source.startswith(GYM) and PurePath(source).suffix not in BUILDERS,
        random_init=config.model.random_init,
        licence=licence if isinstance(licence, str) else None,
        wandb_url=run_dir.facts.get("wandb_url"),
        recipe=config.recipe,
        config_yaml=_shown_config(config),
        steps=step,
        max_new_tokens=config.sampling.max_tokens,
        stop=tuple(config.sampling.stop),
        example=example,
        results=_results(run_dir.metrics_path, step),
        versions=framework_versions(),
    )


def framework_versions() -> dict[str, str]:
    """Installed versions of what a run is made with."""
    versions = {}
    for shown, package in _FRAMEWORKS.items():
        try:
            versions[shown] = version(package)
        except PackageNotFoundError:
            versions[shown] = "not installed"
    return versions | {"Python": platform.python_version()}


def write_model_card(export_dir: Path, facts: CardFacts) -> Path:
    """Writes ``README.md`` beside an exported model; returns its path.

    Raises:
        StorageError: it cannot be written.
    """
    data = ModelCardData(
        base_model=facts.base_model,
        library_name="transformers",
        model_name=facts.model_name,
        license=facts.licence,
        datasets=[facts.dataset_name] if facts.dataset_is_on_hub else None,
        pipeline_tag="text-generation",
        tags=["generated_from_trainer", "raygrpo", "grpo", "reinforcement-learning"],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(facts)}")
    path = export_dir / "README.md"
    try:
        card.save(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    return path


def quick_start_snippet(card_text: str) -> str:
    """The Python code of a card's quick start.

    Raises:
        ValueError: the card has none.
    """
    found = re.search(r"^## Quick start\n.*?^```python\n(.*?)^```", card_text, re.S | re.M)
    if found is None:
        raise ValueError("the card has no quick start")
    return found[1]


def _body(facts: CardFacts) -> str:
    sections = (
        _introduction(facts),
        _quick_start(facts),
        _procedure(facts),
        _evaluation(facts),
        _versions(facts),
        _citations(facts),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(facts: CardFacts) -> str:
    base = facts.base_model
    named = f"[{base}](https://huggingface.co/{base})" if base.count("/") == 1 else f"`{base}`"
    origin = (
        f"It has the architecture of {named} and was trained from random weights."
        if facts.random_init
        else f"It starts from {named}."
    )
    data = facts.dataset_name
    data = f"[{data}](https://huggingface.co/datasets/{data})" if facts.dataset_is_on_hub else data
    return (
        f"# {facts.model_name}\n\nA language model trained by reinforcement learning with raygrpo "
        f"on {data}. {origin}"
    )


def _quick_start(facts: CardFacts) -> str:
    if isinstance(facts.example, str):
        name, value = "prompt", repr(facts.example)
    else:
        name, value = "messages", repr([dict(message) for message in facts.example])
    arguments = f"max_new_tokens={facts.max_new_tokens}, return_full_text=False"
    if facts.stop:
        arguments += f", stop_sequence={list(facts.stop)!r}"
    return f"""## Quick start

```python
from transformers import pipeline

# "." is the directory of this card; give the model's path or hub id from anywhere else.
generator = pipeline("text-generation", model=".")
{name} = {value}
output = generator({name}, {arguments})
print(output[0]["generated_text"])
```"""


def _procedure(facts: CardFacts) -> str:
    papers = _papers(facts.recipe)
    method = (
        "Group relative policy optimisation (GRPO) samples several completions of a prompt, "
        "rates them, and moves the policy towards those that did better than their group's mean. "
        f"It was introduced in {papers[0].link}."
    )
    if papers[1:]:
        more = "; ".join(f"{paper.name}, {paper.link}" for paper in papers[1:])
        method += f" This run also uses ideas of {more}."
    badge = f"[![Weights & Biases]({_BADGE})]({facts.wandb_url})\n\n" if facts.wandb_url else ""
    return f"""## Training procedure

{badge}{method}

The recipe was `{facts.recipe}`, for {facts.steps} steps. What decided the result:

<details><summary>configuration</summary>

```yaml
{facts.config_yaml.strip()}
```

</details>"""


def _evaluation(facts: CardFacts) -> str:
    if not facts.results:
        return ""
    lines = ["## Evaluation", "", "| metric | before | after |", "| --- | --- | --- |"]
    lines += [f"| {name} | {before:.3f} | {after:.3f} |" for name, before, after in facts.results]
    return "\n".join(lines)


def _versions(facts: CardFacts) -> str:
    lines = [f"- {name}: {number}" for name, number in facts.versions.items()]
    return "\n".join(["## Framework versions", "", *lines])


def _citations(facts: CardFacts) -> str:
    entries = "\n\n".join(
        f"{paper.name}:\n\n```bibtex\n{paper.bibtex}\n```" for paper in _papers(facts.recipe)
    )
    return f"## Citations\n\n{entries}"


def _papers(recipe: str) -> tuple[Paper, ...]:
    return _PAPERS.get(recipe, (_GRPO,))


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
    """What the base model's card says of itself, from its directory or the hub's local cache."""
    readme: Any = Path(path).expanduser() / "README.md"
    if not _is_local(path):
        looks_like_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
        readme = try_to_load_from_cache(path, "README.md") if looks_like_id else None
    if not isinstance(readme, (str, Path)) or not Path(readme).is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---", Path(readme).read_text(encoding="utf-8"), re.S)
    try:
        loaded = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _results(metrics_path: Path, step: int) -> tuple[tuple[str, float, float], ...]:
    """First and last value of the evaluation's rewards up to ``step``, where both were measured."""
    if not metrics_path.is_file():
        return ()
    rows = [row for row in read_metrics(metrics_path) if row["step"] <= step]
    names = sorted({name for row in rows for name in row if re.match(r"eval/rewards?(/|$)", name)})
    results = []
    for name in names:
        series = points(rows, name)
        if len(series) > 1:
            results.append((f"`{name}`, step {series[0][0]} and {series[-1][0]}",
                            series[0][1], series[-1][1]))  # fmt: skip
    return tuple(results)


def _shown_config(config: RunConfig) -> str:
    tree = redacted(config.model_dump(mode="json", exclude_defaults=True, exclude=set(_NOT_SHOWN)))
    text: str = yaml.safe_dump(_without_paths(tree), sort_keys=False, width=100)
    return text


def _without_paths(value: Any) -> Any:
    """Absolute paths are cut to their last part; ``json`` keeps the rest as it is."""
    if isinstance(value, Mapping):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and re.match(r"(/|~|\.\./)[^\s]*$", value):
        return PurePath(value).name
    return json.loads(json.dumps(value))
