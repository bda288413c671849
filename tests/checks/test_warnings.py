"""What a start says before its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.checks import warnings as start_events
from raygrpo.config import RunConfig
from raygrpo.config.file import load_config


def config(**sections: Any) -> RunConfig:
    base: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "d"}}
    return load_config({**base, **sections})


def test_each_thing_is_told_once() -> None:
    sources = {
        "train": SimpleNamespace(num_dropped=2, num_truncated=0),
        "eval": SimpleNamespace(num_dropped=0, num_truncated=0),
    }
    told = start_events.start_events(
        config(),
        refused=["step-3 is torn"],
        changed=["a: 1 -> 2"],
        revisions=["m"],
        sources=sources,
    )
    assert list(told) == [
        ("checkpoint_refused", {"reason": "step-3 is torn"}),
        ("config_changed", {"change": "a: 1 -> 2"}),
        ("revision_changed", {"change": "m"}),
        ("long_prompts", {"stream": "train", "dropped": 2, "truncated": 0}),
    ]


@pytest.mark.parametrize(
    ("ratio", "dtype", "gpus", "address", "told"),
    [
        (7.2, "bfloat16", 0, "local", True),
        (0.6, "bfloat16", 0, "local", False),
        (7.2, "float32", 0, "local", False),
        (7.2, "bfloat16", 1, "local", False),
        (7.2, "bfloat16", 0, "10.0.0.1:6379", False),
    ],
)
def test_a_slow_dtype_is_told(
    monkeypatch: pytest.MonkeyPatch,
    ratio: float,
    dtype: str,
    gpus: float,
    address: str,
    told: bool,
) -> None:
    monkeypatch.setattr(start_events, "bfloat16_cost", lambda: ratio)
    run = config(
        model={"path": "m", "dtype": dtype},
        ray={"address": address, "gpus": {"learner": gpus, "generator": 0}},
    )
    events = list(start_events.start_events(run, refused=(), changed=(), revisions=(), sources={}))
    expected = "bfloat16 takes 7 times as long as float32 here: set model.dtype: float32"
    assert events == ([("slow_dtype", {"reason": expected})] if told else [])


@pytest.mark.parametrize(
    ("data", "evaluation", "told"),
    [
        ({"source": "rows.jsonl"}, {}, True),
        ({"source": "rows.jsonl"}, {"num_prompts": 7}, True),
        ({"source": "rows.jsonl"}, {"eval_steps": 0}, False),
        ({"source": "rows.jsonl"}, {"data": {"source": "others.jsonl"}}, False),
        ({"source": "some/set"}, {}, False),  # split test
        ({"source": "some/set"}, {"data": {"params": {"split": "train"}}}, True),
        ({"source": "some/set", "params": {"split": "test"}}, {}, True),
        ({"source": "reasoning_gym:chain_sum"}, {}, False),  # another seed
        ({"source": "python"}, {}, False),
    ],
)
def test_evaluations_on_training_rows_are_told(
    data: dict[str, Any], evaluation: dict[str, Any], told: bool
) -> None:
    run = config(data=data, eval={"eval_steps": 5, **evaluation})
    events = list(start_events.start_events(run, refused=(), changed=(), revisions=(), sources={}))
    assert [kind for kind, _ in events] == (["eval_on_training_rows"] if told else [])
    assert not told or data["source"] in events[0][1]["reason"]


def test_the_cost_is_measured() -> None:
    """Units or none, a product takes some time: between a twentieth and fifty times the other."""
    assert 0.05 < start_events.bfloat16_cost() < 50
