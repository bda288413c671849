"""A run that keeps its best checkpoint and ends early, one killed on the way; evaluations alone.

The reward's level is scripted by the step, so that it is known which evaluation is the best: the
model after step 1. A completion is correct where it has a digit and the level allows it.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raygrpo.storage.checkpoint import Checkpoints, verify
from tests import runs

pytestmark = [*runs.RAY_IN_PROCESS, pytest.mark.usefixtures("shared_ray")]
LEVELS = (0.25, 0.75, 0.5, 0.5, 2.0)
STEPS, LAST, BEST, SAMPLES = 4, 3, 1, 4
REWARD = f"""
def leveled(completions, trainer_state, log_extra, **_):
    digits = [next((c for c in text if c.isdigit()), None) for text in completions]
    log_extra("answer", digits)
    level = {LEVELS}[trainer_state.global_step]
    return [level + 0.5 * (digit is not None) for digit in digits]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


def early(directory: Path, name: str) -> Path:
    """A run that ends early, keeping its best checkpoint."""
    return runs.write_run(
        directory,
        name,
        rewards=[runs.reward(directory, "leveled", REWARD)],
        train={"steps": STEPS},
        checkpoint={"keep": 1},
        eval={
            "eval_steps": 1,
            "data": {"source": str(directory / "rows.jsonl")},
            "num_prompts": 6,
            "num_completions": SAMPLES,
            "best": {"metric": "eval/reward", "patience": LAST - BEST},
        },
    )


@pytest.fixture(scope="module")
def finished(directory: Path) -> Path:
    """A run that ended by itself."""
    config = early(directory, "early")
    runs.run(config)
    return config


@pytest.mark.slow
def test_a_killed_run_names_a_best_checkpoint_that_is_there(
    directory: Path, finished: Path
) -> None:
    """Killed right after the best evaluation was logged; then it goes on to the same end."""
    config = early(directory, "killed")
    process = runs.start(config)
    runs.wait_for_step(process, config, BEST)
    process.kill()
    process.wait(timeout=runs.DEADLINE_S)
    facts = json.loads((runs.run_dir(config) / "run.json").read_text())
    best = facts["best"]
    assert best is not None, "step 0 was evaluated and saved long before"
    there = [path.name for path in Checkpoints(runs.run_dir(config) / "checkpoints").all()]
    assert f"step-{best['step']:08}" in there
    assert best["value"] == runs.metrics(config)[best["step"]]["eval/reward"]
    runs.run(config)
    runs.assert_same_weights(runs.weights(config), runs.weights(finished))


def test_it_ends_early_with_the_best_model(finished: Path) -> None:
    root = runs.run_dir(finished)
    rows = runs.metrics(finished)
    assert runs.steps(finished) == list(range(LAST + 1))
    values = [row["eval/reward"] for row in rows]
    assert max(values) == values[BEST]
    facts = json.loads((root / "run.json").read_text())
    assert facts["best"] == {"step": BEST, "metric": "eval/reward", "value": values[BEST]}
    (event,) = runs.events(finished, "early_stop")
    assert (event["step"], event["best_step"]) == (LAST, BEST)
    checkpoints = Checkpoints(root / "checkpoints")
    assert checkpoints.all() == [checkpoints.path(BEST), checkpoints.path(LAST)]
    for path in checkpoints.all():
        verify(path)
    best, last = (
        load_file(checkpoints.path(step) / "model" / "model.safetensors") for step in (BEST, LAST)
    )
    runs.assert_same_weights(runs.weights(finished), best)
    assert any(not torch.equal(best[name], last[name]) for name in best)
    card = (root / "export" / "README.md").read_text()
    assert f"for {BEST} steps, the best checkpoint by `eval/reward`" in card
    assert f"| `eval/pass@2`, step 0 and {BEST} |" in card


def test_the_same_command_trains_no_further(finished: Path) -> None:
    before = runs.metrics(finished)
    assert "exported model" in runs.run(finished)
    assert runs.metrics(finished) == before
    assert len(runs.events(finished, "started")) == 1


def eval_rows(config: Path, step: int) -> dict[int, list[dict[str, Any]]]:
    """An evaluation's stored completions by group."""
    path = runs.run_dir(config) / "completions" / f"eval-{step:08}.parquet"
    groups = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        groups[row["group_id"]].append(row)
    return groups


def test_numbers_equal_hand_counts(finished: Path) -> None:
    for step, found in enumerate(runs.metrics(finished)):
        groups = eval_rows(finished, step)
        greedy = [rows for group_id, rows in groups.items() if group_id % 2 == 0]
        sampled = [rows for group_id, rows in groups.items() if group_id % 2]
        assert [len(rows) for rows in greedy] == [1] * 6
        assert [len(rows) for rows in sampled] == [SAMPLES] * 6
        expected = {
            "eval/greedy/accuracy": mean(right(rows)[0] for rows in greedy),
            "eval/greedy/reward": mean(rows[0]["reward"] for rows in greedy),
            "eval/reward": mean(row["reward"] for rows in sampled for row in rows),
            f"eval/avg@{SAMPLES}": mean(mean(right(rows)) for rows in sampled),
            f"eval/maj@{SAMPLES}": mean(map(majority, sampled)),
        }
        for k in (1, 2, 4):
            draws = [[any(d) for d in itertools.combinations(right(rows), k)] for rows in sampled]
            expected[f"eval/pass@{k}"] = mean(map(mean, draws))
        assert {name: found[name] for name in expected} == pytest.approx(expected)
    levels = [row[f"eval/avg@{SAMPLES}"] for row in runs.metrics(finished)]
    assert levels[0] == 0 < levels[BEST], "the counts above were not all of nothing"


def mean(values: Any) -> float:
    return statistics.fmean(map(float, values))


def right(rows: Sequence[dict[str, Any]]) -> list[bool]:
    return [row["reward"] >= 1 for row in rows]


def majority(rows: Sequence[dict[str, Any]]) -> float:
    answers = [json.loads(row["extras"])["answer"] for row in rows]
    counts = Counter(answer for answer in answers if answer is not None) or Counter(answers)
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    voices = [(answer, ok) for answer, ok in zip(answers, right(rows), strict=True)]
    return mean(mean(ok for said, ok in voices if said == answer) for answer in winners)


@pytest.mark.parametrize(
    ("of_the_run", "step"), [pytest.param(False, 0, marks=pytest.mark.slow), (True, LAST)]
)
def test_an_evaluation_alone_equals_the_runs(finished: Path, of_the_run: bool, step: int) -> None:
    """Of the configuration: that before the first step; of the run's last checkpoint: its last."""
    out = finished.with_name(f"eval-{step}.json")
    target = str(runs.run_dir(finished) if of_the_run else finished)
    options = ["--step", "last"] if of_the_run else []
    text = runs.invoke("eval", target, *options, "--out", str(out))
    found = json.loads(out.read_text())
    expected = {n: v for n, v in runs.metrics(finished)[step].items() if n.startswith("eval/")}
    assert found["metrics"] == expected
    assert found["step"] == step
    assert f"after {step} steps: 6 prompts" in text
    assert f"eval/maj@{SAMPLES}" in text


def test_generate_makes_the_groups_that_training_starts_with(finished: Path) -> None:
    out = finished.with_name("generated")
    options = ("--num-groups", "3", "--out", str(out))
    text = runs.invoke("generate", str(finished), *options)
    (path,) = out.glob("*.parquet")
    made = pq.read_table(path).to_pylist()
    assert [row["group_id"] for row in made] == [i for i in range(3) for _ in range(4)]
    first = runs.run_dir(finished) / "completions" / "step-00000001.parquet"
    trained = pq.read_table(first).to_pylist()
    assert pq.read_schema(path).equals(pq.read_schema(first))
    same = ("prompt", "completion", "token_ids", "sampler_logprobs", "reward", "extras")
    chosen = [row for row in trained if row["group_id"] < 3]
    for ours, theirs in zip(made, chosen, strict=True):
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert "frac_groups_with_signal" in text
    assert "tokens_per_s" in text
    again = ("generate", str(finished), "--out", str(out))
    assert "name another --out" in runs.invoke(*again, expected=2)
