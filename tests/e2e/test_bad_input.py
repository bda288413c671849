"""Mistakes end with a typed error that names the thing, exit code 2, and nothing started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    runs.write_run(path, "base")
    (path / "empty.jsonl").write_text("")
    (path / "long.jsonl").write_text(json.dumps({"prompt": "1" * 40, "answer": "1"}))
    (path / "other.jsonl").write_text(json.dumps({"promt": "1", "answer": "1"}))
    (path / "weights_only").mkdir()
    (path / "weights_only" / "config.json").write_text("{}")
    (path / "weights_only" / "model.safetensors").write_bytes(b"")
    return path


CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("unknown_key", {"train": {"step": 3}}, ["unknown key train.step", "'steps'"]),
    ("arithmetic", {"train": {"num_minibatches": 3}}, ["no multiple", "num_minibatches"]),
    ("missing_data", {"data": {"source": "nowhere.jsonl"}}, ["nowhere.jsonl"]),
    ("empty_data", {"data": {"source": "{dir}/empty.jsonl"}}, ["empty.jsonl"]),
    ("no_column", {"data": {"source": "{dir}/other.jsonl"}}, ["prompt", "promt"]),
    ("long_prompt", {"data": {"source": "{dir}/long.jsonl"}}, ["40", "16"]),
    ("unknown_reward", {"rewards": [{"func": "exakt"}]}, ["exakt", "'exact'"]),
    ("reward_file", {"rewards": [{"func": "{dir}/no.py:f"}]}, ["no.py"]),
    ("reward_name", {"rewards": [{"func": "{dir}/reward.py:digit"}]}, ["digit", "'digits'"]),
    ("no_rewards", {"rewards": []}, ["no rewards"]),
    ("no_model", {"model": {"path": "{dir}/nothing"}}, ["nothing", "does not exist"]),
    ("no_tokenizer", {"model": {"path": "{dir}/weights_only"}}, ["no tokenizer"]),
    ("unknown_task", {"data": {"source": "reasoning_gym:chain_sums"}}, ["chain_sum"]),
    ("no_chat_template", {"data": {"chat": True}}, ["chat"]),
]


@pytest.mark.parametrize(("name", "change", "words"), CASES, ids=[case[0] for case in CASES])
def test_mistake(directory: Path, name: str, change: dict[str, Any], words: list[str]) -> None:
    text = json.dumps(change).replace("{dir}", str(directory))
    config = runs.write_run(directory, name, **json.loads(text))
    output = runs.invoke("train", str(config), expected=2)
    assert all(word in output for word in words), output
    assert "Traceback" not in output
    assert not (runs.run_dir(config) / "metrics.jsonl").exists(), "nothing was started"


def test_missing_config() -> None:
    assert "nowhere.yaml" in runs.invoke("train", "nowhere.yaml", expected=2)


def test_export_of_what_is_no_run(tmp_path: Path) -> None:
    assert "holds no run" in runs.invoke("export", str(tmp_path), expected=2)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_reward_that_cannot_be_imported(directory: Path) -> None:
    source = "import no_such_module\n\ndef broken(**_):\n    return []\n"
    rewards = [runs.reward(directory, "broken", source)]
    config = runs.write_run(directory, "broken", rewards=rewards)
    output = runs.run(config, expected=2)
    assert "RewardError" in output
    assert "no_such_module" in output


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_reward_that_fails_stops_the_run_with_its_traceback(directory: Path) -> None:
    source = "def fails(completions, **_):\n    raise RuntimeError('the judge is out to lunch')\n"
    rewards = [runs.reward(directory, "fails", source)]
    config = runs.write_run(directory, "fails", rewards=rewards)
    output = runs.run(config, expected=4)
    assert "RewardError" in output
    assert "the judge is out to lunch" in output
    assert "fails.py" in output
    assert runs.events(config, "reward_error")
    (failed,) = runs.events(config, "run_failed")
    assert failed["type"] == "RewardError"
    assert "the judge is out to lunch" in failed["error"]


def test_config_command_lists_and_resolves(directory: Path) -> None:
    assert "train.groups_per_step" in runs.invoke("config")
    base = directory / "base.yaml"
    shown = runs.invoke("config", str(base), "--train.steps=9")
    assert yaml.safe_load(shown)["train"]["steps"] == 9
