"""What a start says before its first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.checks import warnings
from raygrpo.checks.warnings import start_events
from tests import builders


def test_each_thing_is_told_once() -> None:
    sources = {
        "train": SimpleNamespace(num_dropped=2, num_truncated=0),
        "eval": SimpleNamespace(num_dropped=0, num_truncated=0),
    }
    told = start_events(
        builders.config(),
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


X86 = "processor\t: 0\nflags\t\t: fpu avx512f {more}\n\n" * 2
ARM = "processor\t: 0\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    ("cpuinfo", "dtype", "gpus", "address", "told"),
    [
        (X86.format(more="avx512_vnni"), "bfloat16", 0, "local", True),
        (X86.format(more="avx512_bf16"), "bfloat16", 0, "local", False),
        (X86.format(more="amx_bf16 amx_tile"), "bfloat16", 0, "local", False),
        (ARM, "bfloat16", 0, "local", False),
        (None, "bfloat16", 0, "local", False),
        (X86.format(more=""), "float32", 0, "local", False),
        (X86.format(more=""), "bfloat16", 1, "local", False),
        (X86.format(more=""), "bfloat16", 0, "10.0.0.1:6379", False),
    ],
)
def test_a_slow_dtype_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cpuinfo: str | None,
    dtype: str,
    gpus: float,
    address: str,
    told: bool,
) -> None:
    """Where the flags of an x86 CPU lack bfloat16; nothing is claimed of other systems."""
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(warnings, "CPUINFO", tmp_path / "cpuinfo")
    run = builders.config(
        model={"path": "m", "dtype": dtype},
        ray={"address": address, "gpus": {"learner": gpus, "generator": 0}},
    )
    events = list(start_events(run, refused=(), changed=(), revisions=(), sources={}))
    assert [kind for kind, _ in events] == (["slow_dtype"] if told else [])


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
    run = builders.config(data=data, eval={"eval_steps": 5, **evaluation})
    events = list(start_events(run, refused=(), changed=(), revisions=(), sources={}))
    assert [kind for kind, _ in events] == (["eval_on_training_rows"] if told else [])
    assert not told or data["source"] in events[0][1]["reason"]
