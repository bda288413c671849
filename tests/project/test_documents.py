"""What the documents show is what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from typer.testing import CliRunner

from raygrpo.cli import app
from raygrpo.config.file import load_config
from raygrpo.rewards.loading import check_reward

ROOT = Path(__file__).parents[2]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_readmes_run_is_valid() -> None:
    (text,) = blocks("README.md", "yaml")
    config = load_config(yaml.safe_load(text))
    assert config.rewards[0].func == "my_rewards.py:right"
    first, *services = blocks("docs/rewards.md", "yaml")
    assert load_config({**yaml.safe_load(text), **yaml.safe_load(first)}).rewards[1].weight == 0.2
    for block in services:
        for reward in load_config({**yaml.safe_load(text), **yaml.safe_load(block)}).rewards:
            check_reward(reward)


def test_the_readmes_reward_is_right() -> None:
    scope: dict[str, object] = {}
    source = next(block for block in blocks("README.md", "python") if "def right" in block)
    exec(source, scope)
    assert scope["right"]([" 7\n", "8"], answer=["7", "7"]) == [1.0, 0.0]  # type: ignore[operator]


def test_the_readmes_commands_exist() -> None:
    listed = CliRunner().invoke(app, ["--help"]).output
    used = set(re.findall(r"^raygrpo (\w+)", "\n".join(blocks("README.md", "bash")), re.MULTILINE))
    assert used == {"train", "plan", "eval", "generate", "replay", "config", "export"}
    assert all(command in listed for command in used)


def test_the_files_that_documents_name_exist() -> None:
    documents = [path for path in ROOT.rglob("*.md") if not set(path.parts) & {".venv", "runs"}]
    assert len(documents) > 8
    for document in documents:
        text = document.read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / target).exists(), f"{document} links to {target}"
    layout = blocks("README.md", "")[0]
    for name in re.findall(r"\b(\w+\.py)\b", layout):
        assert list((ROOT / "raygrpo").rglob(name)), f"the README's layout names {name}"
