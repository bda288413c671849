"""Pushing: what arrives at a hub on loopback, what is refused, and what survives a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from raygrpo.cli import app
from raygrpo.commands.hub import commit_message, push, push_run
from raygrpo.errors import ConfigError, InfraError, RayGrpoError
from raygrpo.storage.run_dir import RunDir
from tests import builders
from tests.fake_hub import TOKEN, Commit, FakeHub, Repo, fake_hub
from tests.storage.test_checkpoint import state
from tests.tiny import save_tiny_model

# huggingface_hub hands a file to its HTTP client in a form that the client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET_FILES = ("rank-0.pt", "state.pkl", "pytorch_model.bin", "optimizer.pt", "events.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with checkpoints of steps 2 and 4, made without training."""
    from raygrpo.storage.checkpoint import Checkpoints

    root = tmp_path_factory.mktemp("runs") / "my-run"
    model = save_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    data = {"source": "openai/gsm8k"}
    config = builders.config(
        run_dir=str(root), model={"path": str(model)}, data=data, eval={"eval_steps": 2}
    )
    run_dir = RunDir.claim(config)
    run_dir.write_config(config)
    for step in (2, 4):
        directory = Checkpoints(run_dir.checkpoints).begin(step)
        shutil.copytree(model, directory / "model")
        (directory / "model" / "pytorch_model.bin").write_bytes(b"a pickle")
        (directory / "learner").mkdir()
        (directory / "learner" / "rank-0.pt").write_bytes(b"moments")
        Checkpoints(run_dir.checkpoints).commit(directory, step, state(step))
    rows = [
        {"step": 0, "eval/reward": 0.1},
        {"step": 2, "reward": 0.5},
        {"step": 4, "reward": 0.9, "eval/reward": 0.875, "eval/completions/mean_length": 3.0},
    ]
    run_dir.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.note(revisions={"eval": f"openai/gsm8k@{'e' * 40}"}, example="1+1=")
    run_dir.release()
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # The chunked store behind the hub has a protocol of its own; the plain uploads carry the
        # same commit.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def published(hub: FakeHub, name: str = "me/out", branch: str = "main") -> Commit:
    return hub.repos[f"models/{name}"].branches[branch][-1]


def test_the_hub_gets_the_export_byte_for_byte(trained: Path, hub: FakeHub) -> None:
    assert push_run(trained, "me/out") == f"{hub.url}/me/out"
    commit = published(hub)
    export = trained / "export"
    expected = {p.name: p.read_bytes() for p in export.iterdir() if p.suffix != ".bin"}
    assert commit.files == expected
    files = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert files <= commit.files.keys()
    assert not set(SECRET_FILES) & commit.files.keys()
    assert commit.message == "Step 4: eval/reward 0.875"
    assert hub.repos["models/me/out"].private
    assert len(hub.repos["models/me/out"].branches["main"]) == 2, "all in one commit"
    card = ModelCard(commit.files["README.md"].decode())
    assert 'model="me/out"' in card.text
    assert "prompt = '1+1='" in card.text
    (result,) = card.data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("reward", 0.875)
    assert (result.dataset_type, result.dataset_split) == ("openai/gsm8k", "test")
    assert result.dataset_revision == "e" * 40


def test_the_token_travels_in_one_header_and_nowhere_else(trained: Path, hub: FakeHub) -> None:
    push_run(trained, "me/out")
    assert any(seen.headers.get("authorization") == f"Bearer {TOKEN}" for seen in hub.seen)
    for seen in hub.seen:
        others = {k: v for k, v in seen.headers.items() if k.lower() != "authorization"}
        assert TOKEN not in seen.path + repr(others)
        assert TOKEN.encode() not in seen.body
        if "/lfs/" in seen.path and seen.method == "PUT":
            # An upload's address is signed, and may lead to a store that is not the hub's.
            assert "authorization" not in {name.lower() for name in seen.headers}


def test_public_and_branch_on_the_command_line(trained: Path, hub: FakeHub) -> None:
    arguments = ["export", str(trained), "--push-to-hub", "me/open", "--public", "--step", "2"]
    result = CliRunner().invoke(app, [*arguments, "--revision", "trial"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1] == f"{hub.url}/me/open/tree/trial"
    repo = hub.repos["models/me/open"]
    assert not repo.private
    assert repo.branches["trial"][-1].message == "Step 2: reward 0.5"
    assert not repo.branches["main"][-1].files
    assert "--token" not in CliRunner().invoke(app, ["export", "--help"]).output


def test_a_public_repository_is_not_filled_by_accident(trained: Path, hub: FakeHub) -> None:
    hub.repos["models/me/seen"] = Repo(private=False)
    with pytest.raises(ConfigError, match="public"):
        push_run(trained, "me/seen")
    assert not published(hub, "me/seen").files
    push_run(trained, "me/seen", public=True)
    assert published(hub, "me/seen").files


def test_weights_that_are_replaced_go_in_the_same_commit(trained: Path, hub: FakeHub) -> None:
    hub.repos["models/me/out"] = Repo(private=True)
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    kept = {"notes.md": b"mine", "onnx/model.safetensors": b"mine too"}
    hub.commit("models/me/out", {**old, **kept})
    push_run(trained, "me/out")
    files = published(hub).files
    assert not old.keys() & files.keys()
    assert {name: files[name] for name in kept} == kept
    assert len(hub.repos["models/me/out"].branches["main"]) == 3


@pytest.mark.parametrize("where", ["/lfs/", "preupload"])
def test_one_failure_in_the_middle_is_retried(trained: Path, hub: FakeHub, where: str) -> None:
    hub.failures[where] = [500]
    push_run(trained, "me/out")
    assert published(hub).files["model.safetensors"]
    assert not hub.failures[where]


@pytest.mark.parametrize("where", ["/commit/", "repos/create", "validate-yaml"])
def test_what_is_not_retried_shows_nothing_and_can_be_repeated(
    trained: Path, hub: FakeHub, where: str
) -> None:
    hub.failures[where] = [500]
    with pytest.raises(InfraError, match="500") as caught:
        push_run(trained, "me/out")
    assert "again" in caught.value.fix
    if "models/me/out" in hub.repos:
        assert not published(hub).files
    hub.failures.clear()
    push_run(trained, "me/out")
    assert published(hub).files["model.safetensors"]


def refusal(
    trained: Path, name: str = "me/out", kind: type[RayGrpoError] = ConfigError
) -> RayGrpoError:
    with pytest.raises(kind) as caught:
        push_run(trained, name, public=True)
    assert caught.value.fix
    assert TOKEN not in str(caught.value)
    return caught.value


def test_refusals_are_typed(trained: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["models/you/theirs"] = Repo(private=False)
    for name in ("you/theirs", "you/new"):
        assert "may not write" in refusal(trained, name).message
    assert not published(hub, "you/theirs").files
    hub.failures["/commit/"] = [404]
    refusal(trained)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "token" in refusal(trained).message
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(trained / "none"))
    assert "no token" in refusal(trained).message
    for name in ("out", "me/out/more", "me/ou t"):
        assert "no name on the hub" in refusal(trained, name).message


def test_no_network(trained: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 of this machine: nothing listens there.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal(trained, kind=InfraError).message


def test_the_message_names_the_metric_that_decides(tmp_path: Path) -> None:
    best = {"metric": "eval/greedy/reward"}
    config = builders.config(run_dir=str(tmp_path / "r"), eval={"eval_steps": 1, "best": best})
    run_dir = RunDir(tmp_path)
    run_dir.write_config(config)
    row = {"step": 3, "eval/greedy/reward": 0.25, "eval/reward": 0.5, "reward": 1.0}
    run_dir.metrics_path.write_text(json.dumps(row) + "\n")
    assert commit_message(run_dir, 3) == "Step 3: eval/greedy/reward 0.25"
    assert commit_message(run_dir, 4) == "Step 4"


def test_a_link_in_the_export_is_not_followed(tmp_path: Path, hub: FakeHub) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (tmp_path / "private.json").write_text('{"key": 1}')
    (export / "linked.json").symlink_to(tmp_path / "private.json")
    (export / "config.json").write_text("{}")
    push(export, "me/out", "m")
    assert published(hub).files == {"config.json": b"{}"}
