"""Pinned revisions: found at a hub on loopback, kept when branches move or the hub goes away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from raygrpo.checks.revisions import fingerprint, pin
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config
from raygrpo.data.sources import is_on_hub
from raygrpo.errors import ConfigError
from raygrpo.storage.run_dir import RunDir
from tests.fake_hub import FakeHub, fake_hub
from tests.tiny import save_tiny_model

MODEL, DATA, OTHER = "org/tiny", "org/rows", "org/more"
# What a start of a run does with a configuration before any actor: resolve, tokenise, record.
CHECK = """
import json, sys
from raygrpo.config.file import load_config
from raygrpo.storage.run_dir import RunDir
from raygrpo.checks.checked import check

checked = check(load_config(sys.argv[1]))
run_dir = RunDir.claim(checked.given)
run_dir.note(revisions=dict(checked.revisions))
run_dir.release()
prompts = [prompt.text for prompt in checked.prompts.take(9)]
print("told:" + json.dumps([prompts, len(checked.tokenizer), checked.config.model.revision]))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def rows(*prompts: str) -> dict[str, bytes]:
    lines = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in prompts]
    return {"train.jsonl": "\n".join(lines).encode()}


def run_config(directory: Path, **sections: Any) -> RunConfig:
    tree = {
        "run_dir": str(directory / "run"),
        "model": {"path": MODEL},
        "data": {"source": DATA},
        "rewards": [{"func": "exact"}],
        **sections,
    }
    return load_config(tree)


def test_commits_are_found_and_written_into_the_configuration(hub: FakeHub, tmp_path: Path) -> None:
    model, data = hub.commit(f"models/{MODEL}", {}), hub.commit(f"datasets/{DATA}", rows("1"))
    other = hub.commit(f"datasets/{OTHER}", rows("2"))
    hub.repos[f"datasets/{OTHER}"].branches["held-out"] = [hub.repos[f"datasets/{OTHER}"].at(other)]  # type: ignore[list-item]
    newer = hub.commit(f"datasets/{OTHER}", rows("3"))
    config = run_config(
        tmp_path,
        data={
            "source": DATA,
            "params": {"name": "main"},
            "mixture": [
                {"source": OTHER, "weight": 2.0},
                {"source": f"{tmp_path}/local.jsonl"},
                {"params": {"split": "extra"}, "name": "same"},
            ],
        },
        eval={"eval_steps": 5, "data": {"source": OTHER, "params": {"revision": "held-out"}}},
    )
    pinned = pin(config)
    assert pinned.revisions == {
        "model": f"{MODEL}@{model}",
        "data": f"{DATA}@{data}",
        "data.mixture.0": f"{OTHER}@{newer}",
        "eval": f"{OTHER}@{other}",
    }
    assert pinned.config.model.revision == model
    assert pinned.config.data.params == {"name": "main", "revision": data}
    first, second, third = pinned.config.data.mixture
    assert (first.source, first.weight, first.params) == (OTHER, 2.0, {"revision": newer})
    assert not second.params
    assert third.params == {"split": "extra"}, "the same source: it inherits the revision"
    assert pinned.config.eval.data.params == {"revision": other}
    # All else is as it was.
    assert pinned.config.optimizer == config.optimizer
    assert config.model.revision is None


def test_the_same_data_in_evaluation_is_the_same_revision(hub: FakeHub, tmp_path: Path) -> None:
    data = hub.commit(f"datasets/{DATA}", rows("1"))
    config = run_config(tmp_path, eval={"eval_steps": 5}, model={"path": str(tmp_path)})
    assert pin(config).revisions["eval"] == f"{DATA}@{data}"
    assert "eval" not in pin(run_config(tmp_path, model={"path": str(tmp_path)})).revisions


def test_what_was_recorded_holds_when_a_branch_moves(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit(f"models/{MODEL}", {"a": b"1"})
    hub.commit(f"datasets/{DATA}", rows("1"))
    first = pin(run_config(tmp_path))
    hub.commit(f"models/{MODEL}", {"a": b"2"})
    hub.commit(f"datasets/{DATA}", rows("2"))
    seen = len(hub.seen)
    again = pin(run_config(tmp_path), first.revisions)
    assert again == first
    assert len(hub.seen) == seen, "a resumed run asks nobody"
    assert pin(run_config(tmp_path)).revisions != first.revisions


def test_a_revision_that_is_missing_is_a_typed_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit(f"models/{MODEL}", {})
    with pytest.raises(ConfigError, match="no revision 'v9'"):
        pin(run_config(tmp_path, model={"path": MODEL, "revision": "v9"}))


@pytest.mark.parametrize("how", ["refused", "offline", "error"])
def test_without_a_hub_the_cache_answers(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    sha = "a" * 40
    folder = tmp_path / "cache" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(sha)
    (folder / "snapshots" / sha).mkdir(parents=True)
    if how == "refused":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    elif how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub.failures["/api/"] = [503] * 50
    config = run_config(tmp_path, data={"source": "reasoning_gym:chain_sum"})
    assert pin(config).config.model.revision == sha
    shutil.rmtree(folder / "refs")  # as after a download by commit
    assert pin(config).config.model.revision == sha
    unknown = run_config(tmp_path, model={"path": "org/unknown"}, data=config.data.model_dump())
    assert pin(unknown).revisions == {}, "what nobody knows is not made up"
    assert pin(unknown).config == unknown


def test_offline_another_copy_of_the_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for age, letter in enumerate("ab"):
        copy = tmp_path / "org___rows" / "default" / "0.0.0" / (letter * 40)
        copy.mkdir(parents=True)
        os.utime(copy, (1000 + age, 1000 + age))
    config = run_config(tmp_path, model={"path": str(tmp_path)})
    assert pin(config).revisions["data"] == f"{DATA}@{'b' * 40}", "the one that will be loaded"
    with pytest.raises(ConfigError, match="newest copy here is of b"):
        pin(config, {"data": f"{DATA}@{'a' * 40}"})


def test_a_local_model_is_known_by_its_files(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model", "llama")
    config = run_config(tmp_path, model={"path": str(path)}, data={"source": "d.jsonl"})
    before = pin(config)
    assert before.revisions == {"model": fingerprint(config.model)}
    assert before.revisions["model"].startswith("model:")
    assert str(tmp_path) not in before.revisions["model"]
    assert pin(config, before.revisions).changed == ()
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = pin(config, before.revisions)
    (change,) = after.changed
    assert change.startswith("model: model:")
    assert after.revisions == before.revisions, "the record says what the run began with"
    fresh = config.model.model_copy(update={"random_init": True})
    same = fingerprint(fresh)
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(fresh) == same, "weights that are not read do not count"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openai/gsm8k", True), ("gsm8k", True), ("rows.jsonl", False), ("a/b.parquet", False),
        ("reasoning_gym:chain_sum", False), ("python", False), ("json", False), ("~/x/y", False),
        ("/a/b", False),
    ],
)  # fmt: skip
def test_what_is_on_the_hub(source: str, expected: bool) -> None:
    assert is_on_hub(source) == expected


def start(directory: Path, url: str, **environment: str) -> list[Any]:
    config = directory / "config.json"
    config.write_text(run_config(directory).model_dump_json())
    result = subprocess.run(
        [sys.executable, "-c", CHECK, str(config)],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_HOME": str(directory / "home"),
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    told: list[Any] = json.loads(result.stdout.rpartition("told:")[2])
    return told


@pytest.mark.timeout(900)  # three processes that import torch and datasets
@pytest.mark.slow
def test_a_run_resumes_on_what_it_began_with(tmp_path: Path) -> None:
    """Real downloads by transformers and datasets; then the branches move; then the hub is gone."""
    from tests.tiny import tiny_tokenizer

    files = {p.name: p.read_bytes() for p in save_tiny_model(tmp_path / "m").iterdir()}
    shutil.rmtree(tmp_path / "m")
    larger = tiny_tokenizer()
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tmp_path / "t")
    moved = {**files, **{p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()}}
    size = len(tiny_tokenizer())
    with fake_hub() as hub:
        sha = hub.commit(f"models/{MODEL}", files)
        hub.commit(f"datasets/{DATA}", rows("1+1=", "2+2="))
        first = [["1+1=", "2+2="], size, sha]
        assert start(tmp_path, hub.url) == first
        run_dir = RunDir.at(run_config(tmp_path))
        recorded = run_dir.facts["revisions"]
        assert recorded["model"] == f"{MODEL}@{sha}"
        hub.commit(f"models/{MODEL}", moved)
        hub.commit(f"datasets/{DATA}", rows("9+9="))
        (run_dir.checkpoints / "step-00000001").mkdir(parents=True)
        assert start(tmp_path, hub.url) == first
        assert run_dir.facts["revisions"] == recorded
    assert start(tmp_path, hub.url, HF_HUB_OFFLINE="1") == first
