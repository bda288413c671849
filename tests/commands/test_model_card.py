"""The model card: its front matter, its honesty about paths, and a quick start that runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from raygrpo.commands.model_card import write_model_card
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.data.maker import PromptMaker
from raygrpo.storage.run_dir import RunDir
from tests.tiny import save_tiny_model, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run_config(tmp_path: Path, model: Path | str, **sections: Any) -> RunConfig:
    tree = {
        "run_dir": str(tmp_path / "runs" / "my-run"),
        "model": {"path": str(model)},
        "data": {"source": str(tmp_path / "train.jsonl")},
        "rewards": [{"func": f"{tmp_path}/rewards.py:good", "params": {"api_key": "hunter2"}}],
        "sampling": {"max_tokens": 7},
    }
    return load_config(tree | sections)


def card_of(
    config: RunConfig,
    *,
    step: int = 40,
    rows: Sequence[Mapping[str, float]] = (),
    **run: Any,
) -> str:
    """The card of ``step``, written into the run's own directory, with ``run`` in run.json."""
    run_dir = RunDir.claim(config)
    run_dir.note(**{"example": "3+4=", **run})
    run_dir.release()
    if rows:
        run_dir.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_model_card(run_dir.root, config, run_dir, step=step).read_text()


def quick_start_snippet(card: str) -> str:
    (code,) = re.findall(r"^## Quick start\n.*?^```python\n(.*?)^```", card, re.S | re.M)
    return str(code)


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    data = ModelCard(card_of(run_config(tmp_path, "owner/model"))).data.to_dict()
    assert data["base_model"] == "owner/model"
    assert (data["library_name"], data["model_name"]) == ("transformers", "my-run")
    assert {"generated_from_trainer", "raygrpo", "grpo"} <= set(data["tags"])
    assert not {"datasets", "license"} & data.keys()  # a local file, and a model without a card
    parts = [{"source": "me/more", "weight": 2}, {"source": "x.jsonl"}]
    mixed = run_config(tmp_path, "a/b", data={"source": "openai/gsm8k", "mixture": parts})
    assert ModelCard(card_of(mixed)).data.to_dict()["datasets"] == ["openai/gsm8k", "me/more"]


def test_no_path_of_the_machine_and_no_secret_gets_in(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "models" / "tiny-llama")
    card = card_of(run_config(tmp_path, model))
    assert "`tiny-llama`" in card
    assert "base_model: tiny-llama" in card
    assert "train.jsonl" in card
    assert "rewards.py:good" in card
    assert str(tmp_path) not in card
    assert str(Path.home()) not in card
    assert "hunter2" not in card


@pytest.mark.parametrize(
    ("readme", "base", "licence"),
    [
        ("---\nbase_model: owner/origin\nlicense: gemma\n---\n# x\n", "owner/origin", "gemma"),
        ("---\n: [broken\n---\n", "tiny", None),
    ],
)
def test_the_base_models_own_card_gives_lineage_and_licence(
    tmp_path: Path, readme: str, base: str, licence: str | None
) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    (model / "README.md").write_text(readme)
    data = ModelCard(card_of(run_config(tmp_path, model))).data
    assert (data.base_model, data.license) == (base, licence)


@pytest.mark.parametrize(
    ("recipe", "papers"),
    [
        ("deepseekmath", {"2402.03300"}),
        ("trl024", {"2402.03300"}),
        ("dapo", {"2402.03300", "2503.14476"}),
        ("dr_grpo", {"2402.03300", "2503.20783"}),
        ("default", {"2402.03300", "2503.14476", "2503.20783"}),
    ],
)
def test_the_method_and_its_papers(tmp_path: Path, recipe: str, papers: set[str]) -> None:
    card = card_of(run_config(tmp_path, "a/b", recipe=recipe))
    known = {"2402.03300", "2503.14476", "2503.20783"}
    assert {paper for paper in known if f"arxiv.org/abs/{paper}" in card} == papers
    assert {paper for paper in known if f"eprint = {{arXiv:{paper}}}" in card} == papers
    assert card.count("@article{") == len(papers)
    assert f"`{recipe}`, for 40 steps" in card


def test_the_badge_is_there_only_for_a_run_with_an_address(tmp_path: Path) -> None:
    config = run_config(tmp_path, "a/b")
    assert "wandb" not in card_of(config)
    url = "https://wandb.ai/me/p/runs/123"
    assert f"]({url})" in card_of(config, wandb_url=url).split("## Training procedure")[1]


def test_versions_are_those_installed(tmp_path: Path) -> None:
    listed = card_of(run_config(tmp_path, "a/b")).split("### Framework versions")[1]
    for shown, package in {"raygrpo": "raygrpo", "Ray": "ray", "Pytorch": "torch"}.items():
        assert f"- {shown}: {version(package)}\n" in listed


def test_results_are_measured_ones_up_to_the_exported_step(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "eval/reward": 0.125, "eval/rewards/good/mean": 0.2},
        {"step": 10, "reward": 0.4},
        {"step": 20, "eval/reward": 0.75, "eval/completions/mean_length": 3.0},
        {"step": 40, "eval/reward": 0.99},
    ]
    config = run_config(tmp_path, "a/b")
    assert "## Evaluation" not in card_of(config)
    card = card_of(config, step=20, rows=rows)
    assert "| `eval/reward`, step 0 and 20 | 0.125 | 0.750 |\n\n## Training" in card
    assert "0.99" not in card
    assert "good/mean" not in card  # measured only once


def test_rates_are_results_and_spreads_are_not(tmp_path: Path) -> None:
    config = run_config(tmp_path, "a/b")
    shown = ("eval/greedy/accuracy", "eval/avg@4", "eval/pass@16", "eval/maj@4",
             "eval/greedy/rewards/good/mean")  # fmt: skip
    left_out = ("eval/reward_std", "eval/pass@4/num_left_out", "eval/num_dropped",
                "eval/reward/error_frac", "eval/completions/mean_length")  # fmt: skip
    rows = [{"step": step, **dict.fromkeys(shown + left_out, step / 4)} for step in (0, 2)]
    best = {"step": 2, "metric": "eval/maj@4", "value": 0.5}
    card = card_of(config, step=2, rows=rows, best=best)
    table = card.split("## Evaluation")[1].split("\n#")[0]
    for name in shown:
        assert f"| `{name}`, step 0 and 2 | 0.000 | 0.500 |" in table
    assert not [name for name in left_out if f"`{name}`" in table]
    assert "for 2 steps, the best checkpoint by `eval/maj@4`." in card
    assert "best checkpoint" not in card_of(config, step=1)


def test_the_shown_configuration_is_the_runs(tmp_path: Path) -> None:
    config = run_config(tmp_path, "a/b", recipe="dapo", optimizer={"lr": 3e-5})
    card = card_of(config)
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown["optimizer"]["lr"] == 3e-5
    assert shown["advantage"]["scale"] == "group"  # what the recipe set
    assert shown["sampling"]["max_tokens"] == 7
    assert not {"run_dir", "ray", "tracking"} & shown.keys()


def run_snippet(snippet: str, export: Path) -> dict[str, Any]:
    """The names that the quick start defines, run in the directory of its card."""
    names: dict[str, Any] = {}
    exec(snippet.replace('model="."', f"model={str(export)!r}"), names)
    return names


def test_the_quick_start_runs_as_it_stands(tmp_path: Path) -> None:
    """On plain text; the names are those of a fresh process."""
    export = save_tiny_model(tmp_path / "export")
    config = run_config(tmp_path, "a/b", sampling={"max_tokens": 7, "stop": ["\n"]})
    made = run_snippet(quick_start_snippet(card_of(config)), export)["output"]
    text = made[0]["generated_text"]
    assert 0 < len(text) <= 7 * len("<unk>")  # one token is one character, or a special token


def test_the_quick_start_asks_what_the_run_asked(tmp_path: Path) -> None:
    snippet = quick_start_snippet(card_of(run_config(tmp_path, "a/b"), example='k "7":\n'))
    assert "\nprompt = 'k \"7\":\\n'\n" in snippet


def test_the_sections_are_those_of_trls_card(tmp_path: Path) -> None:
    spec = find_spec("trl")  # found, not imported: the import takes long
    assert spec is not None and spec.origin is not None
    template = (Path(spec.origin).parent / "templates" / "lm_model_card.md").read_text()
    card = card_of(run_config(tmp_path, "a/b"))
    headings = re.findall(r"^##+ .*$", template, re.M)
    assert headings == [line for line in card.splitlines() if line in headings] != []
    assert re.search(r"^# Model Card for my-run$", card, re.M)
    assert "is a fine-tuned version of [a/b](https://huggingface.co/a/b)" in card
    assert not re.search(r"{[{%]|\n\n\n", card.replace("{{", "", 2 * card.count("@article")))


def test_results_of_the_exported_step_reach_the_hubs_table(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        "a/b",
        data={"source": "openai/gsm8k", "params": {"name": "main"}},
        eval={"eval_steps": 20, "data": {"params": {"split": "held_out"}}},
    )
    measured = {"eval/reward": 0.75, "eval/pass@4": 0.9, "eval/completions/mean_length": 3.0}
    rows = [
        {"step": 20, **measured, "eval/num_completions": 8.0},
        {"step": 40, "eval/reward": 0.99},
    ]
    revisions = {"model": f"a/b@{'1' * 40}", "eval": f"openai/gsm8k@{'2' * 40}"}
    card = card_of(config, step=20, rows=rows, revisions=revisions)
    results = ModelCard(card).data.eval_results or []
    assert {r.metric_type: r.metric_value for r in results} == {"reward": 0.75, "pass@4": 0.9}
    for result in results:
        assert (result.dataset_type, result.dataset_config) == ("openai/gsm8k", "main")
        assert (result.dataset_split, result.dataset_revision) == ("held_out", "2" * 40)
    assert f"model `a/b@{'1' * 40}`" in card
    # Of step 30 nothing was measured: what was measured of another step is not its result.
    unmeasured = ModelCard(card_of(config, step=30))
    assert not unmeasured.data.eval_results


def test_the_quick_start_talks_as_the_run_did(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>", "{{ mark }}")
    export = save_tiny_model(tmp_path / "export")
    tokenizer.save_pretrained(export)
    data = {"source": "a/b", "system": "Be brief.", "chat": True, "chat_params": {"mark": "<me>"}}
    config = run_config(tmp_path, "a/b", data=data)
    ours = PromptMaker(config.data, ["prompt"], tokenizer).render({"prompt": "1+1="}, 0)
    assert ours.messages is not None and ours.string.endswith("<me>")
    snippet = quick_start_snippet(card_of(config, example=[dict(m) for m in ours.messages]))
    assert "'role': 'system', 'content': 'Be brief.'" in snippet
    assert "tokenizer_encode_kwargs={'mark': '<me>'}" in snippet
    # What the pipeline hands to the model is what the run's own renderer makes.
    messages = run_snippet(snippet, export)["messages"]
    chat = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, mark="<me>"
    )
    assert chat == ours.string
    assert "tokenizer_encode_kwargs" not in quick_start_snippet(card_of(config, example="1+1="))
