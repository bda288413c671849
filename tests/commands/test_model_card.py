"""The model card: its front matter, its honesty about paths, and a quick start that runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from raygrpo.commands.model_card import CardFacts, card_facts, quick_start_snippet, write_model_card
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.data.rendering import Renderer
from raygrpo.storage.run_dir import RunDir
from tests.tiny import save_tiny_model, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run_config(tmp_path: Path, model: Path | str, **sections: Any) -> RunConfig:
    return load_config(
        {
            "run_dir": str(tmp_path / "runs" / "my-run"),
            "model": {"path": str(model)},
            "data": {"source": str(tmp_path / "train.jsonl")},
            "rewards": [{"func": f"{tmp_path}/rewards.py:good", "params": {"api_key": "hunter2"}}],
            "sampling": {"max_tokens": 7},
            **sections,
        }
    )


def facts_of(config: RunConfig, *, tokenizer: Any = None, step: int = 40, **run: Any) -> CardFacts:
    run_dir = RunDir.claim(config)
    run_dir.note(**run)
    run_dir.release()
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    return card_facts(config, run_dir.root, step=step, tokenizer=tokenizer)


def card_of(tmp_path: Path, facts: CardFacts) -> str:
    return write_model_card(tmp_path, facts).read_text()


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    facts = facts_of(run_config(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct"))
    data = ModelCard(card_of(tmp_path, replace(facts, licence="apache-2.0"))).data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["library_name"] == "transformers"
    assert data["model_name"] == "my-run"
    assert data["license"] == "apache-2.0"
    assert {"generated_from_trainer", "raygrpo", "grpo"} <= set(data["tags"])
    assert "datasets" not in data  # a local file is none of the hub's
    unlicensed = ModelCard(card_of(tmp_path, facts)).data.to_dict()
    assert "license" not in unlicensed
    on_hub = facts_of(
        run_config(tmp_path, "a/b", data={"source": "openai/gsm8k"}, run_dir=f"{tmp_path}/r")
    )
    assert ModelCard(card_of(tmp_path, on_hub)).data.to_dict()["datasets"] == ["openai/gsm8k"]


def test_no_path_of_the_machine_and_no_secret_gets_in(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "models" / "tiny-llama")
    card = card_of(tmp_path, facts_of(run_config(tmp_path, model)))
    assert "`tiny-llama`" in card
    assert "base_model: tiny-llama" in card
    assert "train.jsonl" in card
    assert "rewards.py:good" in card
    assert str(tmp_path) not in card
    assert str(Path.home()) not in card
    assert "hunter2" not in card


def test_the_base_models_own_card_gives_lineage_and_licence(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    (model / "README.md").write_text("---\nbase_model: owner/origin\nlicense: gemma\n---\n# x\n")
    facts = facts_of(run_config(tmp_path, model))
    assert (facts.base_model, facts.licence) == ("owner/origin", "gemma")
    (model / "README.md").write_text("---\n: [broken\n---\n")
    facts = facts_of(run_config(tmp_path, model))
    assert (facts.base_model, facts.licence) == ("tiny", None)


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
    card = card_of(tmp_path, facts_of(run_config(tmp_path, "a/b", recipe=recipe)))
    known = {"2402.03300", "2503.14476", "2503.20783"}
    assert {paper for paper in known if f"arxiv.org/abs/{paper}" in card} == papers
    assert {paper for paper in known if f"eprint = {{arXiv:{paper}}}" in card} == papers
    assert card.count("@article{") == len(papers)
    assert f"`{recipe}`, for 40 steps" in card


def test_the_badge_is_there_only_for_a_run_with_an_address(tmp_path: Path) -> None:
    config = run_config(tmp_path, "a/b")
    assert "wandb" not in card_of(tmp_path, facts_of(config))
    url = "https://wandb.ai/me/p/runs/123"
    card = card_of(tmp_path, facts_of(config, wandb_url=url))
    procedure = card.split("## Training procedure")[1].split("\n## ")[0]
    assert f"]({url})" in procedure
    assert "wandb-github-badge" in procedure


def test_versions_are_those_installed(tmp_path: Path) -> None:
    card = card_of(tmp_path, facts_of(run_config(tmp_path, "a/b")))
    listed = card.split("## Framework versions")[1].split("\n## ")[0]
    packages = {
        "raygrpo": "raygrpo", "Ray": "ray", "DeepSpeed": "deepspeed", "Pytorch": "torch",
        "Transformers": "transformers", "Datasets": "datasets", "Tokenizers": "tokenizers",
    }  # fmt: skip
    for shown, package in packages.items():
        assert f"- {shown}: {version(package)}\n" in listed


def test_results_are_measured_ones_up_to_the_exported_step(tmp_path: Path) -> None:
    config = run_config(tmp_path, "a/b")
    rows = [
        {"step": 0, "eval/reward": 0.125, "eval/rewards/good/mean": 0.2},
        {"step": 10, "reward": 0.4},
        {"step": 20, "eval/reward": 0.75, "eval/completions/mean_length": 3.0},
        {"step": 40, "eval/reward": 0.99},
    ]
    run_dir = RunDir.claim(config)
    run_dir.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.release()
    card = card_of(tmp_path, facts_of(config, step=20))
    assert "| `eval/reward`, step 0 and 20 | 0.125 | 0.750 |" in card
    assert "0.99" not in card
    assert "good" not in card.split("## Evaluation")[1].split("\n## ")[0]  # measured only once
    assert "## Evaluation" not in card_of(tmp_path, replace(facts_of(config), results=()))


def test_rates_are_results_and_spreads_are_not(tmp_path: Path) -> None:
    config = run_config(tmp_path, "a/b")
    shown = ("eval/greedy/accuracy", "eval/avg@4", "eval/pass@16", "eval/maj@4",
             "eval/greedy/rewards/good/mean")  # fmt: skip
    left_out = ("eval/reward_std", "eval/pass@4/num_left_out", "eval/num_dropped",
                "eval/reward/error_frac", "eval/completions/mean_length")  # fmt: skip
    run_dir = RunDir.claim(config)
    rows = [{"step": step, **dict.fromkeys(shown + left_out, step / 4)} for step in (0, 2)]
    run_dir.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.note(best={"step": 2, "metric": "eval/maj@4", "value": 0.5})
    run_dir.release()
    card = card_of(tmp_path, facts_of(config, step=2))
    table = card.split("## Evaluation")[1].split("\n#")[0]
    for name in shown:
        assert f"| `{name}`, step 0 and 2 | 0.000 | 0.500 |" in table
    assert not [name for name in left_out if f"`{name}`" in table]
    assert "for 2 steps, the best checkpoint by `eval/maj@4`." in card
    assert "best checkpoint" not in card_of(tmp_path, facts_of(config, step=1))


def test_the_shown_configuration_is_the_runs(tmp_path: Path) -> None:
    config = run_config(tmp_path, "a/b", recipe="dapo", optimizer={"lr": 3e-5})
    card = card_of(tmp_path, facts_of(config))
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown["optimizer"]["lr"] == 3e-5
    assert shown["advantage"]["scale"] == "group"  # what the recipe set
    assert shown["sampling"]["max_tokens"] == 7
    assert not {"run_dir", "ray", "tracking"} & shown.keys()


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_the_quick_start_runs_as_it_stands(tmp_path: Path, kind: str) -> None:
    export = save_tiny_model(tmp_path / "export")
    tokenizer = tiny_tokenizer()
    if kind == "chat":
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(export)
    config = run_config(tmp_path, "a/b", sampling={"max_tokens": 7, "stop": ["\n"]})
    card = card_of(export, facts_of(config, tokenizer=tokenizer))
    snippet = quick_start_snippet(card)
    assert ("messages = [{" in snippet) == (kind == "chat")
    result = subprocess.run(
        [sys.executable, "-c", snippet + "\nprint('made:', repr(output))"],
        cwd=export,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    made = result.stdout.split("made: ")[1]
    text = eval(made)[0]["generated_text"]
    assert isinstance(text, str)
    assert 0 < len(text) <= 7 * len("<unk>")  # one token is one character, or a special token


def test_an_example_can_be_given(tmp_path: Path) -> None:
    facts = replace(facts_of(run_config(tmp_path, "a/b")), example='k "7":\n')
    namespace: dict[str, Any] = {}
    line = next(
        line for line in quick_start_snippet(card_of(tmp_path, facts)).splitlines() if "k" in line
        and line.startswith("prompt")
    )  # fmt: skip
    exec(line, namespace)
    assert namespace["prompt"] == 'k "7":\n'


def test_a_card_without_a_quick_start_is_refused() -> None:
    with pytest.raises(ValueError, match="quick start"):
        quick_start_snippet("# a card\n```python\n1\n```\n")


def test_the_structure_is_that_of_trls_card(tmp_path: Path) -> None:
    spec = find_spec("trl")  # found, not imported: that takes long
    assert spec is not None and spec.origin is not None
    template = (Path(spec.origin).parent / "templates" / "lm_model_card.md").read_text()
    card = card_of(tmp_path, facts_of(run_config(tmp_path, "a/b")))
    headings = re.findall(r"^##+ .*$", template, re.M)
    assert headings == [line for line in card.splitlines() if line in headings]
    assert len(headings) >= 4
    assert re.search(r"^# Model Card for my-run$", card, re.M)
    assert "is a fine-tuned version of [a/b](https://huggingface.co/a/b)" in card
    names = re.findall(r"^- (\w+): {{", template, re.M)
    assert {"Transformers", "Pytorch", "Datasets", "Tokenizers"} <= set(names)
    for name in names:
        assert name == "TRL" or re.search(rf"^- {name}: \d", card, re.M)
    assert "Cite GRPO as:" in card


def test_all_data_sets_of_the_hub_are_listed(tmp_path: Path) -> None:
    parts = [
        {"source": "me/more", "weight": 2},
        {"source": "x.jsonl"},
        {"params": {"split": "test"}},
    ]
    data = {"source": "openai/gsm8k", "mixture": parts}
    card = card_of(tmp_path, facts_of(run_config(tmp_path, "a/b", data=data)))
    assert ModelCard(card).data.to_dict()["datasets"] == ["openai/gsm8k", "me/more"]
    passed = facts_of(
        run_config(tmp_path, "a/b", data={"source": "python"}, run_dir=f"{tmp_path}/r2")
    )
    assert "datasets" not in ModelCard(card_of(tmp_path, passed)).data.to_dict()


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
    run_dir = RunDir.claim(config)
    run_dir.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.release()
    revisions = {"model": f"a/b@{'1' * 40}", "eval": f"openai/gsm8k@{'2' * 40}"}
    card = card_of(tmp_path, facts_of(config, step=20, revisions=revisions))
    results = ModelCard(card).data.eval_results or []
    assert {r.metric_type: r.metric_value for r in results} == {"reward": 0.75, "pass@4": 0.9}
    for result in results:
        assert (result.dataset_type, result.dataset_config) == ("openai/gsm8k", "main")
        assert (result.dataset_split, result.dataset_revision) == ("held_out", "2" * 40)
    assert f"model `a/b@{'1' * 40}`" in card
    # Of step 30 nothing was measured: what was measured of another step is not its result.
    unmeasured = ModelCard(card_of(tmp_path, facts_of(config, step=30)))
    assert not unmeasured.data.eval_results


def test_the_quick_start_talks_as_the_run_did(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>", "{{ mark }}")
    export = save_tiny_model(tmp_path / "export")
    tokenizer.save_pretrained(export)
    data = {"source": "a/b", "system": "Be brief.", "chat": True, "chat_params": {"mark": "<me>"}}
    config = run_config(tmp_path, "a/b", data=data)
    snippet = quick_start_snippet(card_of(export, facts_of(config, tokenizer=tokenizer)))
    assert "'role': 'system', 'content': 'Be brief.'" in snippet
    assert "tokenizer_encode_kwargs={'mark': '<me>'}" in snippet
    # What the pipeline hands to the model is what the run's own renderer makes.
    namespace: dict[str, Any] = {}
    exec(snippet.replace('model="."', f"model={str(export)!r}"), namespace)
    section = config.data
    renderer = Renderer(section, ["prompt"], tokenizer)
    (first, asked) = namespace["messages"]
    ours = renderer.render({"prompt": [asked]}, "row 0")
    assert ours.messages == (first, asked)
    chat = tokenizer.apply_chat_template(
        namespace["messages"], tokenize=False, add_generation_prompt=True, mark="<me>"
    )
    assert ours.string == chat
    assert chat.endswith("<me>")
    data = {"source": "a/b", "system": "Be brief.", "template": "{q}"}
    config = run_config(tmp_path, "a/b", data=data, run_dir=f"{tmp_path}/r3")
    text = facts_of(config, tokenizer=tokenizer)
    plain = quick_start_snippet(card_of(tmp_path, text))
    assert "prompt = " in plain
    assert "tokenizer_encode_kwargs" not in plain
