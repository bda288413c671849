"""A run over a mixture with a streamed part and retired prompts, stopped and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raygrpo.config.file import load_config
from raygrpo.data.loading import make_prompts
from raygrpo.models import load_tokenizer
from tests import runs
from tests.data.test_pass_rate import judged

STEPS = 8
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_ray")]
REWARD = '''
"""Some prompts are solved at once; elsewhere groups differ, and no completion is right."""


def judge(prompts, completions, **_):
    shares = [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
    return [1.0 if p.startswith("easy") else s / 2 for p, s in zip(prompts, shares)]
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was stopped once on the way."""
    directory = tmp_path_factory.mktemp("data_modes")
    names = [f"{kind} {i}=" for kind in ("easy", "hard") for i in range(3)]
    for file, prompts in (("sums", names), ("words", [f"w{i}" for i in range(50)])):
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (directory / f"{file}.jsonl").write_text("\n".join(lines))
    streamed = {
        "source": str(directory / "words.jsonl"),
        "params": {"streaming": True},
        "max_pass_rate": None,
    }
    path = runs.write_run(
        directory,
        "mixed",
        data={"source": str(directory / "sums.jsonl"), "mixture": [streamed], "max_pass_rate": 1.0},
        rewards=[{**runs.reward(directory, "judge", REWARD), "timeout_s": 60.0}],
        train={"steps": STEPS, "dynamic_sampling": True, "max_refill_factor": 2.0},
    )
    process = runs.start(path)
    runs.wait_for_step(process, path, 2)
    process.terminate()
    runs.finish(process, path, expected=3)
    runs.run(path)
    return path


def stored(path: Path) -> list[dict[str, Any]]:
    """The groups in the run's store, each once, in order of admission."""
    groups = {}
    for file in sorted((runs.run_dir(path) / "completions").glob("step-*.parquet")):
        for row in pq.read_table(file, columns=["step", "group_id", "prompt_id"]).to_pylist():
            groups[row["group_id"]] = row
    return [groups[group_id] for group_id in sorted(groups)]


def test_the_stopped_run_draws_what_a_whole_one_draws(config: Path) -> None:
    """The whole one is a stream of prompts of its own, told of the same steps."""
    (resumed,) = runs.events(config, "resumed")
    assert 2 <= resumed["step"] < STEPS
    settings = load_config(config)
    prompts = make_prompts(settings.data, load_tokenizer(settings.model), seed=settings.seed)
    groups = stored(config)
    last = {group["step"]: group["group_id"] for group in groups}
    ends = [last[step] for step in sorted(last)]
    assert len(ends) == STEPS
    drawn: list[str] = []
    for row, end in zip(runs.metrics(config), ends, strict=True):
        while len(drawn) <= end:
            prompt = prompts.next()
            right = float((prompt.text or "").startswith("easy"))
            summary = judged(len(drawn), prompt.id, [right])
            prompts.observe([replace(summary, source=prompt.source)])
            drawn.append(prompt.id)
        prompts.settle(end)
        wanted = prompts.metrics()
        assert {name: row[name] for name in wanted} == wanted
    assert [g["prompt_id"] for g in groups] == [drawn[g["group_id"]] for g in groups]


def test_solved_prompts_are_not_drawn_again(config: Path) -> None:
    drawn = [group["prompt_id"] for group in stored(config)]
    easy = [name for name in drawn if name in {f"sums/row-{i}" for i in range(3)}]
    hard = [name for name in drawn if name in {f"sums/row-{i}" for i in range(3, 6)}]
    assert len(easy) <= 3
    assert len(hard) >= 6, "the others were drawn again and again"
    streamed = [name for name in drawn if name.startswith("words/")]
    assert len(streamed) == len(set(streamed)), "neither repeated nor skipped in the first epoch"
    assert runs.metrics(config)[-1]["data/num_retired"] == 3
    assert not runs.events(config, "prompts_restored")


def test_metrics_tell_the_parts_apart(config: Path) -> None:
    rows = runs.metrics(config)
    for row in rows:
        numbers = [row.get(f"sources/{name}/num_groups", 0) for name in ("sums", "words")]
        assert sum(numbers) == row["num_groups"]
    first = [row for row in rows if row.get("sources/sums/num_groups")]
    assert max(row["sources/sums/frac_reward_zero_std"] for row in first) > 0
    assert max(row.get("sources/words/reward", 0) for row in rows) <= 0.5
