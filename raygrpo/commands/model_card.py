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
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from raygrpo.commands.model_card_papers import papers_of
from raygrpo.config import RunConfig
from raygrpo.data.sources import BUILDERS, GYM, eval_section, is_on_hub, split_of
from raygrpo.errors import StorageError
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.curve import points
from raygrpo.tracking.files import read_metrics
from raygrpo.tracking.wandb_logger import redacted

Example = str | Sequence[Mapping[str, Any]]

_FRAMEWORKS = {
    "raygrpo": "raygrpo",
    "Ray": "ray",
    "DeepSpeed": "deepspeed",
    "Transformers": "transformers",
    "Pytorch": "torch",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
}
_BADGE = "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg"
# Where and how fast a run ran says nothing about the model, and may name machines.
_RESULT = re.compile(r"eval/(greedy/)?(reward|accuracy|rewards/.+/mean)|eval/(avg|pass|maj)@\d+")
_NOT_SHOWN = ("run_dir", "ray", "tracking", "generators", "scorers", "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says. No path of the machine belongs in any of it.

    ``base_model``: hub id, or the directory's name. ``datasets``: names, and whether the hub has
    them. ``results``: (what, before, after) of the evaluation's metrics; ``evaluated``: those of
    the exported step, by name. ``best_metric``: what that step was chosen by, if it was the best.
    ``example``: a prompt for the quick start, text or messages.
    ``hub_id``: where the model is published. ``revisions``: what was trained on what, exactly.
    """

    base_model: str
    model_name: str
    datasets: Mapping[str, bool]
    random_init: bool
    licence: str | None
    wandb_url: str | None
    recipe: str
    config_yaml: str
    steps: int
    best_metric: str | None
    max_new_tokens: int
    stop: tuple[str, ...]
    example: Example
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    hub_id: str | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)
    results: tuple[tuple[str, float, float], ...] = ()
    evaluated: tuple[EvalResult, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def card_facts(
    config: RunConfig,
    root: Path,
    *,
    step: int,
    tokenizer: Any,
    example: Example | None = None,
    hub_id: str | None = None,
) -> CardFacts:
    """The facts of the run in ``root`` after ``step`` steps; ``example`` is a prompt to show.

    ``hub_id`` is where the model is published; None for an export that stays on disk.

    Raises:
        StorageError: run.json or metrics.jsonl cannot be read.
    """
    run_dir = RunDir(root)
    facts = run_dir.facts
    best = facts.get("best")
    if example is None:
        example = _made_up_example(config, tokenizer)
    pinned = str((facts.get("revisions") or {}).get("model", ""))
    # A relative path is no path from another directory: run.json knows what it was.
    local = _is_local(config.model.path) or (":" in pinned and "@" not in pinned)
    about_base = _read_front_matter(config.model.path)
    lineage = about_base.get("base_model")
    licence = about_base.get("license")
    return CardFacts(
        base_model=lineage
        if isinstance(lineage, str) and local
        else PurePath(config.model.path).name
        if local
        else _name_of(config.model.path),
        model_name=hub_id.split("/")[1] if hub_id else root.name,
        datasets=_datasets(config),
        random_init=config.model.random_init,
        licence=licence if isinstance(licence, str) else None,
        wandb_url=facts.get("wandb_url"),
        recipe=config.recipe,
        config_yaml=_shown_config(config),
        steps=step,
        best_metric=best["metric"] if best and best["step"] == step else None,
        max_new_tokens=config.sampling.max_tokens,
        stop=tuple(config.sampling.stop),
        example=example,
        chat_template_kwargs={} if isinstance(example, str) else config.data.chat_params,
        hub_id=hub_id,
        revisions=facts.get("revisions") or {},
        results=_results(run_dir.metrics_path, step),
        evaluated=_evaluated(run_dir, config, step),
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
        datasets=[name for name, is_on_hub in facts.datasets.items() if is_on_hub] or None,
        pipeline_tag="text-generation",
        tags=["generated_from_trainer", "raygrpo", "grpo", "reinforcement-learning"],
        eval_results=list(facts.evaluated) or None,
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
        _evaluation(facts),
        _procedure(facts),
        _versions(facts),
        _citations(facts),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(facts: CardFacts) -> str:
    base = facts.base_model
    named = f"[{base}](https://huggingface.co/{base})" if base.count("/") == 1 else f"`{base}`"
    origin = (
        f"has the architecture of {named} and was trained from random weights"
        if facts.random_init
        else f"is a fine-tuned version of {named}"
    )
    data = ", ".join(
        f"[{name}](https://huggingface.co/datasets/{name})" if is_on_hub else name
        for name, is_on_hub in facts.datasets.items()
    )
    return (
        f"# Model Card for {facts.model_name}\n\nThis model {origin}. It was trained by "
        f"reinforcement learning on {data}, with raygrpo {facts.versions.get('raygrpo', '')}."
    )


def _quick_start(facts: CardFacts) -> str:
    if isinstance(facts.example, str):
        name, value = "prompt", repr(facts.example)
    else:
        name, value = "messages", repr([dict(message) for message in facts.example])
    arguments = f"max_new_tokens={facts.max_new_tokens}, return_full_text=False"
    if facts.stop:
        arguments += f", stop_sequence={list(facts.stop)!r}"
    if facts.chat_template_kwargs:
        arguments += f", tokenizer_encode_kwargs={dict(facts.chat_template_kwargs)!r}"
    where = '# "." is the directory of this card; elsewhere, give its path or the hub id.\n'
    where = "" if facts.hub_id else where
    return f"""## Quick start

```python
from transformers import pipeline

{where}generator = pipeline("text-generation", model={json.dumps(facts.hub_id or ".")})
{name} = {value}
output = generator({name}, {arguments})
print(output[0]["generated_text"])
```"""


def _procedure(facts: CardFacts) -> str:
    papers = papers_of(facts.recipe)
    method = (
        "Group relative policy optimisation (GRPO) samples several completions of a prompt, "
        "rates them, and moves the policy towards those that did better than their group's mean. "
        f"It was introduced in {papers[0].link}."
    )
    if papers[1:]:
        more = "; ".join(f"{paper.name}, {paper.link}" for paper in papers[1:])
        method += f" This run also uses ideas of {more}."
    badge = f"[![Weights & Biases]({_BADGE})]({facts.wandb_url})\n\n" if facts.wandb_url else ""
    best = f", the best checkpoint by `{facts.best_metric}`" if facts.best_metric else ""
    return f"""## Training procedure

{badge}{method}

The recipe was `{facts.recipe}`, for {facts.steps} steps{best}.{_revisions(facts)}
What decided the result:

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
    return "\n".join(["### Framework versions", "", *lines])


def _revisions(facts: CardFacts) -> str:
    named = [f"{role} `{what}`" for role, what in facts.revisions.items()]
    return f" Revisions: {', '.join(named)}." if named else ""


def _citations(facts: CardFacts) -> str:
    entries = "\n\n".join(
        f"Cite {paper.name} as:\n\n```bibtex\n{paper.bibtex}\n```"
        for paper in papers_of(facts.recipe)
    )
    return f"## Citations\n\n{entries}"


def _made_up_example(config: RunConfig, tokenizer: Any) -> Example:
    """A prompt of the form that the run's prompts have, as far as its configuration tells."""
    data, asked = config.data, "What is 3 plus 4?"
    chats = data.chat or (data.chat is None and data.template is None)
    if not chats or getattr(tokenizer, "chat_template", None) is None:
        return f"Question: {asked}\nAnswer:"
    system = [{"role": "system", "content": data.system}] if data.system else []
    return [*system, {"role": "user", "content": asked}]


def _datasets(config: RunConfig) -> dict[str, bool]:
    """The names of all sources, and whether each is the hub's."""
    parts = [config.data.source, *(part.source for part in config.data.mixture)]
    return {_name_of(source): is_on_hub(source) for source in map(str, parts) if source}


def _evaluated(run_dir: RunDir, config: RunConfig, step: int) -> tuple[EvalResult, ...]:
    """What was measured of the exported step itself, for the hub's own table."""
    rows = read_metrics(run_dir.metrics_path) if run_dir.metrics_path.is_file() else []
    values = {
        name: row[name]
        for row in rows
        if row["step"] == step
        for name in row
        if _RESULT.fullmatch(name)
    }
    if not values:
        return ()
    section = eval_section(config.data, config.eval, seed=config.seed)
    pinned = (run_dir.facts.get("revisions") or {}).get("eval", "").partition("@")
    return tuple(
        EvalResult(
            task_type="text-generation",
            dataset_type=_name_of(section.source),
            dataset_name=_name_of(section.source),
            dataset_split=split_of(section) if is_on_hub(section.source) else None,
            dataset_config=section.params.get("name") if is_on_hub(section.source) else None,
            dataset_revision=pinned[2] or None,
            metric_type=name.removeprefix("eval/"),
            metric_name=name,
            metric_value=round(float(value), 6),
        )
        for name, value in values.items()
    )


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
    """First and last value of the evaluation's results up to ``step``, if both were measured."""
    if not metrics_path.is_file():
        return ()
    rows = [row for row in read_metrics(metrics_path) if row["step"] <= step]
    names = sorted({name for row in rows for name in row if _RESULT.fullmatch(name)})
    results = []
    for name in names:
        series = points(rows, name)
        if len(series) > 1:
            results.append((f"`{name}`, step {series[0][0]} and {series[-1][0]}",
                            series[0][1], series[-1][1]))  # fmt: skip
    return tuple(results)


def _shown_config(config: RunConfig) -> str:
    tree = redacted(config.model_dump(mode="json", exclude_defaults=True, exclude=set(_NOT_SHOWN)))
    for reward in tree.get("rewards", ()):  # where a service runs may name machines
        params = reward.get("params", {})
        params |= {name: "<address>" for name in ("url", "base_url") if name in params}
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
