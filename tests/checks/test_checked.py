"""The two steps of a configuration: checked, then resolved by what the cluster says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raygrpo.checks.checked import check
from raygrpo.checks.resolved import Facts, resolve
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.engines.select import EngineChoice
from raygrpo.errors import ConfigError
from raygrpo.storage.run_dir import RunDir
from tests.tiny import save_tiny_model

LAPTOP = Facts(local=True, cores=8, engine=EngineChoice(engine="transformers", reason="configured"))


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run that names everything relative to the current directory."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text("def good(completions, **_): return [1.0]\n")
    return config()


def config(**sections: Any) -> RunConfig:
    tree = {
        "run_dir": "run",
        "model": {"path": "tiny"},
        "data": {"source": "rows.jsonl", "mixture": [{"source": "rows.jsonl", "name": "more"}]},
        "rewards": [{"func": "reward.py:good"}],
        "eval": {"eval_steps": 2, "num_prompts": 3, "data": {"source": "rows.jsonl"}},
    }
    return load_config({**tree, **sections})


def test_a_checked_configuration_holds_anywhere(given: RunConfig, tmp_path: Path) -> None:
    checked = check(given)
    assert checked.given == given
    assert checked.config.model.path == str(tmp_path / "tiny")
    assert checked.config.rewards[0].func == f"{tmp_path / 'reward.py'}:good"
    assert checked.config.data.source == str(tmp_path / "rows.jsonl")
    assert checked.config.data.mixture[0].source == checked.config.data.source
    assert checked.config.eval.data.source == checked.config.data.source
    assert checked.prompts.take(1)[0].text == "0+1="
    assert len(checked.eval_prompts) == 3
    assert set(checked.sources) == {"train", "eval"}
    assert checked.revisions["model"].startswith("tiny:")
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"rewards": []}, "no rewards"),
        ({"model": {"path": "./none"}}, "does not exist"),
        ({"rewards": [{"func": "reward.py:bad"}]}, "bad"),
        ({"eval": {"eval_steps": 1, "best": {"metric": "eval/rewad"}}}, "no evaluation"),
        ({"deterministic": True, "generators": {"engine": "vllm"}}, "transformers"),
        ({"learner": {"deepspeed": {"fp16": {}}}}, "fp16"),
    ],
)
def test_a_mistake_is_found_without_a_cluster(
    given: RunConfig, sections: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(config(**sections))


def test_only_what_the_place_decides_is_filled_in(given: RunConfig, tmp_path: Path) -> None:
    checked = check(given).config
    resolved = resolve(checked, LAPTOP).config
    assert resolved.run_dir == str(tmp_path / "run")
    assert resolved.generators.engine == "transformers"
    assert (resolved.ray.threads.learner, resolved.ray.threads.generator) == (8, 8)
    back = {"run_dir": checked.run_dir, "generators": checked.generators, "ray": checked.ray}
    assert resolved.model_copy(update=back) == checked
    assert resolve(resolved, LAPTOP).config == resolved
    nodes = [{"Resources": {"CPU": 6.0}, "Labels": {}}] * 2
    elsewhere = Facts(local=False, cores=8, engine=LAPTOP.engine, nodes=nodes)
    assert resolve(checked, elsewhere).config.ray.threads.learner == 5  # (12 - 2 scorers) // 2


def test_a_run_resumes_on_another_machine(given: RunConfig, tmp_path: Path) -> None:
    """Threads differ there, but the user gave the same configuration."""
    first = RunDir.claim(given)
    first.write_config(resolve(check(given).config, LAPTOP).config)
    first.release()
    (first.checkpoints / "step-00000001").mkdir(parents=True)
    again = RunDir.claim(given)
    assert again.changed == []
    again.release()
    assert load_config(again.given_path) == given
    assert load_config(again.config_path).ray.threads.learner == 8
    with pytest.raises(ConfigError, match=r"model\.path"):
        RunDir.claim(config(model={"path": "other"}))
