"""docs/metrics.md names what the code logs, and nothing else."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from raygrpo.algorithm.ledger import TokenLedger
from raygrpo.algorithm.loss import LossConfig, LossInputs, policy_loss
from raygrpo.tracking.metrics import StepFacts, evaluation_metrics, step_metrics
from raygrpo.types import GroupSummary, Stat
from tests import builders

ROOT = Path(__file__).parents[2]
# {metric} stands for a metric of these sections.
SHARED = ("Rewards", "Completions")
_PLACE = re.compile(r"\{(\w+)\}")
_MEANING = {"k": r"\d+", "n": r"\d+", "name": r"[^/]+", "source": r"[^/]+"}


@cache
def rows() -> dict[str, tuple[str, list[str]]]:
    """The documented patterns: their section and their cells."""
    found: dict[str, tuple[str, list[str]]] = {}
    section = ""
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            assert name.strip("`") not in found, f"{name} is documented twice"
            found[name.strip("`")] = (section, cells)
    return found


def _matches(pattern: str, name: str) -> bool:
    if pattern.endswith("{metric}"):
        prefix = pattern.removesuffix("{metric}")
        shared = [p for p, (section, _) in rows().items() if section in SHARED]
        rest = name.removeprefix(prefix)
        return name.startswith(prefix) and any(_matches(p, rest) for p in shared)
    texts = [re.escape(text) for text in _PLACE.split(pattern)[::2]]
    places = [_MEANING[place] for place in _PLACE.findall(pattern)]
    pairs = zip_longest(texts, places, fillvalue="")
    return re.fullmatch("".join(map("".join, pairs)), name) is not None


def documented(name: str) -> bool:
    """Whether docs/metrics.md says what a metric is; ``step`` is no metric."""
    return name == "step" or any(_matches(pattern, name) for pattern in rows())


def group(source: str, size: int = 4) -> GroupSummary:
    return replace(
        builders.summary(0, [i % 2 for i in range(size)]),
        metrics={"rewards/exact/error_frac": (0.0,), "rewards/exact/cache_hit_frac": (0.5,)},
        generate_s=0.5,
        score_s=0.25,
        reward_s={"exact": 0.1, "format": 0.2},
        source=source,
        answers=tuple("ab"[i % 2] for i in range(size)),
    )


def learner_stats() -> dict[str, Stat]:
    """What a learner with everything on reports."""
    ones, ids = torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.long)
    inputs = LossInputs(
        logprobs=-ones,
        old_logprobs=-ones,
        sampler_logprobs=-0.9 * ones,
        ref_logprobs=-0.8 * ones,
        entropies=ones,
        loss_mask=torch.ones(1, 4, dtype=torch.bool),
        policy_mask=None,
        advantages=torch.ones(1),
        sequence_ids=ids,
        loss_weights=torch.ones(1),
    )
    config = LossConfig(beta=0.1, correction="tis", off_policy_threshold=0.1)
    stats = policy_loss(inputs, LossConfig(loss="cispo"))[1] | policy_loss(inputs, config)[1]
    totals = ("loss", "grad_norm", "learning_rate", "entropy_coef")
    return stats | {name: Stat.of(1.0) for name in totals}


@cache
def logged() -> frozenset[str]:
    """What the metric functions give when everything happens."""
    groups = [group("first"), group("second")]
    step = step_metrics(
        StepFacts(
            step=1,
            finished=groups,
            trained=groups,
            num_teaching=1,
            stats=learner_stats(),
            epoch=0.5,
            num_tokens=10,
            step_s=1.0,
            update_s=0.5,
        )
    )
    evaluation = evaluation_metrics([group("", 1)], groups, 4)
    return frozenset({*step, *evaluation, *TokenLedger().metrics(0)})


def test_every_metric_is_documented() -> None:
    assert [name for name in sorted(logged()) if not documented(name)] == []


@cache
def written() -> dict[str, list[str]]:
    """The texts in the code by module, with {} for what is filled in."""
    texts: dict[str, list[str]] = {}
    for path in (ROOT / "raygrpo").rglob("*.py"):
        found = texts.setdefault(str(path), [])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return texts


def in_the_code(pattern: str) -> bool:
    """Whether a module writes a name, or puts it together from a prefix and a word."""
    wanted = _PLACE.sub("{}", pattern)
    prefix, _, last = wanted.rpartition("/")
    return any(
        wanted in texts or (f"{prefix}/{{}}" in texts and last in texts)
        for texts in written().values()
    )


@pytest.mark.parametrize("pattern", sorted(rows()))
def test_no_documented_name_is_unknown_to_the_code(pattern: str) -> None:
    assert any(_matches(pattern, name) for name in logged()) or in_the_code(pattern)


def test_rows_are_whole() -> None:
    for name, (section, cells) in rows().items():
        assert len(cells) == 3, f"{section}: {name}"
        assert cells[1].endswith("."), f"{section}: {name} has no definition"
        assert cells[2] in ("same", "like", "-"), f"{section}: {name}"


def test_trls_names_are_those_that_trl_logs() -> None:
    """Names marked as TRL's are in TRL's source, and those in TRL's that raygrpo has are marked."""
    import trl.trainer.grpo_trainer as trainer

    source = Path(str(trainer.__file__)).read_text()
    theirs = set(re.findall(r'_metrics\[(?:mode|"train")\]\[f?"([^"]+)"\]', source))
    theirs = {name.replace("{reward_func_name}", "{name}") for name in theirs}
    theirs |= {"loss", "grad_norm", "learning_rate", "epoch"}  # transformers' own
    ours = {
        name for name, (section, c) in rows().items() if c[2] != "-" and section != "Evaluation"
    }
    assert ours <= theirs
    assert {name for name in theirs if documented(name.replace("{name}", "x"))} == ours
    # What only options bring that raygrpo does not have.
    assert theirs - ours == {
        "aux_loss", "policy_loss", "tools/call_frequency", "tools/failure_frequency",
        "vespo/phi_seq_mean",
    }  # fmt: skip


def test_placeholders() -> None:
    assert documented("rewards/file.py:f/mean")
    assert documented("trained/rewards/exact/std")
    assert documented("eval/greedy/completions/mean_length")
    assert documented("eval/pass@16")
    assert not documented("eval/pass@x")
    assert not documented("rewards/exact/median")
    assert not documented("trained/loss")
    assert not documented("anything")
