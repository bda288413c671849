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


def test_the_commands_of_documents_parse() -> None:
    """Each `raygrpo` line of a code block names a command and options that it takes."""
    lines = [
        line.partition("#")[0]
        for name in ("README.md", "docs/running.md")
        for block in blocks(name, "bash")
        for line in block.splitlines()
        if line.startswith("raygrpo ")
    ]
    assert len({line.split()[1] for line in lines}) == 7, "every command is shown"
    for line in lines:
        _, command, *arguments = line.split()
        help_text = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
        assert "Usage" in help_text, line
        for option in re.findall(r"--[a-z_.-]+", " ".join(arguments)):
            is_override = "." in option or option == "--run_dir"
            assert is_override or option in help_text, f"{command} has no {option}"


def documents() -> list[Path]:
    outside = {".venv", "runs", "weights", "raygrpo"}  # raygrpo holds a template of a card
    return [path for path in ROOT.rglob("*.md") if not set(path.relative_to(ROOT).parts) & outside]


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve() -> None:
    assert len(documents()) > 8
    for document in documents():
        for target in re.findall(r"\]\(([^):]+)\)", document.read_text()):
            file, _, anchor = target.partition("#")
            linked = document.parent / file if file else document
            assert linked.exists(), f"{document} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{document} links to {target}"


def test_files_that_the_architecture_names_exist() -> None:
    """A path in backticks, below `raygrpo/` or the root."""
    for document in [*ROOT.glob("docs/architecture*.md"), ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(r"`([\w/]+\.py)`", document.read_text()):
            places = (ROOT / "raygrpo" / name, ROOT / name, document.parent / name)
            assert any(place.exists() for place in places), f"{document} names {name}"


def test_pages_fit_a_screens_width() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for document in documents():
        in_code = False
        for number, line in enumerate(document.read_text().splitlines(), start=1):
            in_code ^= line.lstrip().startswith("```")
            is_free = in_code or (line.startswith(("|", "    ")) and document != ROOT / "README.md")
            assert is_free or len(line) <= 100, f"{document}:{number}"


def test_the_serial_example_stays_a_page() -> None:
    assert len((ROOT / "examples" / "serial.py").read_text().splitlines()) <= 120
