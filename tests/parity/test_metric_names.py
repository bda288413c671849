"""One step of TRL 1.16's GRPOTrainer, and our metrics of the same completions and rewards.

Compared number by number: all that depends on completions and rewards alone. Not compared, because
it is made of something else (each has a test of its own, against formulas or against TRL):

- ``loss``, ``grad_norm``, ``learning_rate``, ``entropy``, ``clip_ratio/*``: of the update and its
  logprobs; loss, rate and gradient in test_trl.py, the rest in tests/algorithm/test_loss.py.
- ``kl``: logged with a reference only; ``sampling/*``: with vLLM only, which is not here.
- ``step_time``: a clock. ``epoch``: counted in rows by TRL, in prompts by our data source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from raygrpo.tracking.metrics import StepFacts, step_metrics
from raygrpo.types import GroupSummary, Score, Version
from tests.parity.trl_cases import TRL_SETTINGS
from tests.tiny import save_tiny_model

pytestmark = [
    # What transformers says of TRL's use of it.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

NUM_GROUPS, GROUP_SIZE, MAX_TOKENS = 4, 4, 24
WEIGHTS = {"length": 0.5, "first": 2.0}
COMPARED = {
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    *(f"rewards/{name}/{what}" for name in WEIGHTS for what in ("mean", "std")),
    *(
        f"completions/{what}_{length}"
        for what in ("mean", "min", "max")
        for length in ("length", "terminated_length")
    ),
    "completions/clipped_ratio",
    "num_tokens",
    "depth",  # from log_metric
}
OTHERS = {
    "loss", "grad_norm", "learning_rate", "entropy", "step_time", "epoch",
    "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
    "clip_ratio/region_mean",
}  # fmt: skip


@dataclass(kw_only=True)
class Seen:
    """What TRL generated, rewarded and logged: columns [group * completion]."""

    prompts: list[str] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    depths: list[float] = field(default_factory=list)
    logs: dict[str, float] = field(default_factory=dict)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A step of TRL: groups that differ, one whose rewards are alike, some without a reward."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    root = tmp_path_factory.mktemp("trl")
    found = Seen()

    def length(
        prompts: list[str], completion_ids: list[list[int]], log_metric: Any, **_: Any
    ) -> list[float | None]:
        found.prompts, found.completion_ids = list(prompts), [list(c) for c in completion_ids]
        found.depths = [float(sum(ids) % 7) for ids in completion_ids]
        for depth in found.depths:
            log_metric("depth", depth)
        values: list[float | None] = [
            1.0 if prompt.startswith("0") else len(ids) / 8
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        values[-1] = None
        found.rewards["length"] = values
        return values

    def first(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        values: list[float | None] = [
            0.25 if prompt.startswith("0") else (None if i % 5 == 0 else ids[0] / 70)
            for i, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True))
        ]
        values[-1] = None  # as above: without any reward
        found.rewards["first"] = values
        return values

    class Recorder(GRPOTrainer):  # type: ignore[misc]
        def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
            super().log(logs, *arguments, **keywords)
            if "grad_norm" in logs:
                found.logs = dict(self.state.log_history[-1])

    config = GRPOConfig(
        output_dir=str(root / "output"),
        per_device_train_batch_size=NUM_GROUPS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        reward_weights=list(WEIGHTS.values()),
        max_steps=1,
        seed=1,
        **TRL_SETTINGS,
    )
    trainer = Recorder(
        model=str(save_tiny_model(root / "model", "llama", seed=3)),
        reward_funcs=[length, first],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{n}+{n * n}=" for n in range(NUM_GROUPS)]}),
    )
    trainer.train()
    return found


def summaries(seen: Seen) -> list[GroupSummary]:
    """The same groups as a scorer reports them."""
    groups = []
    for start in range(0, len(seen.prompts), GROUP_SIZE):
        indices = range(start, start + GROUP_SIZE)
        ids = [seen.completion_ids[i] for i in indices]
        lengths = tuple(map(len, ids))
        groups.append(
            GroupSummary(
                stream="train",
                group_id=start // GROUP_SIZE,
                attempt=0,
                prompt_id=seen.prompts[start],
                prompt_length=len(seen.prompts[start]),  # one token a character
                lengths=lengths,
                num_loss_tokens=lengths,
                finishes=tuple("stop" if c[-1] in (0, 1) else "length" for c in ids),
                oldest=(Version(1, 0),) * GROUP_SIZE,
                newest=(Version(1, 0),) * GROUP_SIZE,
                scores=tuple(score({n: v[i] for n, v in seen.rewards.items()}) for i in indices),
                metrics={"depth": tuple(seen.depths[i] for i in indices)},
            )
        )
    return groups


def score(parts: Mapping[str, float | None]) -> Score:
    given = [WEIGHTS[name] * value for name, value in parts.items() if value is not None]
    return Score(value=sum(given) if given else None, parts=parts)


def metrics_of(groups: list[GroupSummary]) -> dict[str, float]:
    tokens = sum(g.prompt_length * len(g.lengths) + sum(g.lengths) for g in groups)
    return step_metrics(
        StepFacts(
            step=0,
            finished=groups,
            trained=groups,
            num_teaching=len(groups),
            stats={},
            epoch=1.0,
            num_tokens=tokens,
            step_s=1.0,
            update_s=1.0,
        )
    )


def test_the_step_has_every_case(seen: Seen) -> None:
    groups = summaries(seen)
    finishes = {finish for group in groups for finish in group.finishes}
    assert finishes == {"stop", "length"}
    assert sum(s.value is None for group in groups for s in group.scores) == 1
    assert 0 < seen.logs["frac_reward_zero_std"] < 1


@pytest.mark.parametrize("name", sorted(COMPARED))
def test_a_metric_has_trls_value(seen: Seen, name: str) -> None:
    ours = metrics_of(summaries(seen))
    assert math.isfinite(seen.logs[name])
    # TRL computes in fp32.
    assert ours[name] == pytest.approx(seen.logs[name], rel=1e-6)


def test_trl_logs_nothing_that_this_file_does_not_know(seen: Seen) -> None:
    bookkeeping = {"step", "total_flos", "train_loss", "train_runtime"}
    assert set(seen.logs) - bookkeeping == COMPARED | OTHERS
