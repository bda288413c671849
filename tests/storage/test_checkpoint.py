from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raygrpo.algorithm.ledger import TokenLedger
from raygrpo.algorithm.window import WindowState
from raygrpo.errors import ConfigError, StorageError
from raygrpo.storage.checkpoint import Checkpoints, verify
from raygrpo.storage.run_dir import RunDir
from raygrpo.training.state import RunState, load_state
from tests import builders
from tests.builders import request


def state(step: int) -> RunState:
    window = WindowState(admitted=9, dropped=1, taken=8, refilled=0, pending=(request(8),))
    return RunState(
        step=step,
        window=window,
        prompts={"epoch": 0},
        ledger=TokenLedger(reported=5),
        num_tokens=3,
        buffered_tokens=2,
    )


def save(checkpoints: Checkpoints, step: int) -> Path:
    directory = checkpoints.begin(step)
    (directory / "learner").mkdir()
    (directory / "learner" / "rank-0.pt").write_bytes(os.urandom(1000))
    return checkpoints.commit(directory, step, state(step))


def test_newest_valid_wins(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    paths = [save(checkpoints, step) for step in (2, 4, 6)]
    assert checkpoints.newest_valid() == (paths[2], [])
    shard = paths[2] / "learner" / "rank-0.pt"
    data = bytearray(shard.read_bytes())
    data[500] ^= 1  # one flipped bit, same size
    shard.write_bytes(data)
    newest, problems = checkpoints.newest_valid()
    assert newest == paths[1]
    assert len(problems) == 1
    assert "rank-0.pt is damaged" in problems[0]
    (paths[1] / "manifest.json").unlink()
    assert checkpoints.newest_valid()[0] == paths[0]
    restored = load_state(paths[0])
    assert restored.step == 2
    assert restored.window.pending[0].group_id == 8


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "format"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    path = save(Checkpoints(tmp_path), 1)
    verify(path)
    shard, manifest = path / "learner" / "rank-0.pt", path / "manifest.json"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(StorageError):
        verify(path)


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, -1, [4, 5]),
        (2, 2, [2, 4, 5]),
        (2, 4, [4, 5]),
        (1, 5, [5]),
        (0, -1, [1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: int, left: list[int]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in (1, 2, 3, 4, 5):
        checkpoints.prune(save(checkpoints, step), best)
    assert checkpoints.all() == [checkpoints.path(step) for step in left]


def test_steps_after_the_saved_one_do_not_count_as_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (2, 6, 8):
        save(checkpoints, step)
    checkpoints.prune(save(checkpoints, 4), -1)
    assert checkpoints.all() == [checkpoints.path(step) for step in (4, 6, 8)]


def test_what_a_crash_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    good = save(checkpoints, 1)
    half = checkpoints.begin(2)
    (half / "learner.pt").write_bytes(b"half")
    assert checkpoints.newest_valid() == (good, [])
    checkpoints.begin(3)
    assert not half.exists(), "the next save removes it"


def test_a_run_is_claimed_once_and_not_changed(tmp_path: Path) -> None:
    config = builders.config(run_dir=str(tmp_path / "run"))
    claimed = RunDir.claim(config)
    with pytest.raises(ConfigError, match="in use"):
        RunDir.claim(config)
    assert (claimed.next_incarnation(), claimed.next_incarnation()) == (1, 2)
    claimed.release()
    # Until something was trained, a mistake in the configuration can be corrected.
    RunDir.claim(config.model_copy(update={"seed": 7})).release()
    RunDir.claim(config).release()
    save(Checkpoints(claimed.checkpoints), 1)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 200})})
    again = RunDir.claim(longer)
    assert again.changed == ["train.steps: 100 -> 200"]
    again.release()
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        RunDir.claim(other)
    RunDir.claim(longer).release()


def test_a_strangers_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no run"):
        RunDir.claim(builders.config(run_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from raygrpo.config.file import load_config\n"
        "from raygrpo.storage.run_dir import RunDir\n"
        f"RunDir.claim(load_config({ {**builders.SMALLEST, 'run_dir': str(tmp_path / 'run')}!r}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    RunDir.claim(builders.config(run_dir=str(tmp_path / "run"))).release()
