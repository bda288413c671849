"""``raygrpo.train`` from Python: closures as rewards, datasets, messages; run in a process of its
own, as a script of a user's is."""

from __future__ import annotations

import json
from pathlib import Path

from tests import runs
from tests.tiny import save_tiny_model

SCRIPT = '''
import sys
import datasets
import raygrpo
from raygrpo.errors import ConfigError

directory, wanted = sys.argv[1], "12"


def closure(completions, bonus, **columns):
    """Reads a column, and a variable of the script."""
    assert columns["trainer_state"].max_steps == 2
    columns["log_metric"]("seen", 1.0)
    texts = [c[0]["content"] for c in completions]
    return [sum(ch in wanted for ch in t) / 6 + b for t, b in zip(texts, bonus)]


async def shorter(completions, completion_ids, **_):
    return [None if len(ids) > 5 else -0.01 * len(ids) for ids in completion_ids]


rows = datasets.Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"{i}+1="}], "bonus": i / 10} for i in range(8)]
)
outcome = raygrpo.train(
    {
        "run_dir": directory + "/run",
        "model": {"path": directory + "/model"},
        "data": {"max_prompt_length": 16},
        "sampling": {"num_completions": 4, "max_tokens": 6},
        "train": {"steps": 2, "groups_per_step": 2},
        "scorers": {"count": 1},
    },
    reward_funcs=[closure, shorter],
    dataset=rows,
)
assert outcome.finished
print("EXPORT", outcome.export)
try:
    raygrpo.train({"model": {"path": "x"}}, reward_funcs=closure)
except ConfigError as error:
    print("REFUSED", error.message)
'''


def test_train_from_python(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "qwen2")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    output = runs.python(str(script), str(tmp_path), cwd=tmp_path).stdout
    assert "EXPORT" in output
    assert "REFUSED missing key data" in output
    steps = runs.rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["seen"]) for row in steps] == [(1, 1.0), (2, 1.0)]
    assert all(row["rewards/closure/mean"] > 0 for row in steps)
