"""The profile's bounds on a real engine, without Ray."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from raygrpo.actors import profiling
from raygrpo.actors.profiling import EngineTracer, ProfileRequest, Tracer, order_profile
from raygrpo.config import ModelSection
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.errors import ConfigError
from raygrpo.types import Group, Version
from tests.builders import request
from tests.tiny import save_tiny_model

TOKENS = 20


def generate(root: Path, profile: ProfileRequest | None) -> list[Group]:
    """Three groups under version 0, as a generator would have them."""
    model = root / "model"
    if not model.exists():
        save_tiny_model(model, "llama", seed=3)
    engine = TransformersEngine(
        ModelSection(path=str(model)),
        seed=0,
        max_rows=8,
        deterministic=False,
        version=Version(0, 0),
    )
    traced = engine if profile is None else EngineTracer(engine, profile, "generator-0")
    for number in range(3):
        order = request(number, max_tokens=TOKENS, min_tokens=TOKENS)
        traced.submit(replace(order, min_version=Version(0, 0)))
    groups: list[Group] = []
    while engine.num_unfinished:
        groups += traced.step()
    return sorted(groups, key=lambda group: group.request.group_id)


def attention_calls(profile: ProfileRequest) -> int:
    with gzip.open(profile.path("generator-0"), "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event["name"] == "aten::scaled_dot_product_attention" for event in events)


def test_an_engine_trace_is_bounded_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(tmp_path, None)
    whole = order_profile(tmp_path / "whole", 1, done=0, steps=1)
    cut = order_profile(tmp_path / "cut", 1, done=0, steps=1)
    for profile, limit in ((whole, 200), (cut, 5)):
        monkeypatch.setattr(profiling, "_MAX_ENGINE_STEPS", limit)
        found = generate(tmp_path, profile)
        for mine, other in zip(found, expected, strict=True):
            for a, b in zip(mine.completions, other.completions, strict=True):
                assert a.token_ids.tolist() == b.token_ids.tolist()
                assert a.logprobs.tolist() == b.logprobs.tolist()
    # Two layers: three prompts in the first step, together, then a token of every row in each step.
    assert attention_calls(whole) == 2 * TOKENS
    assert attention_calls(cut) == 2 * 5


def test_only_the_asked_step_is_traced(tmp_path: Path) -> None:
    later = order_profile(tmp_path, 2, done=0, steps=2)
    generate(tmp_path, later)
    assert list(later.directory.iterdir()) == []


def test_a_trace_that_cannot_be_written_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = ProfileRequest(step=1, directory=tmp_path / "not-here")
    with Tracer(elsewhere, "learner-0"):
        pass
    assert not elsewhere.directory.exists()
    blocked = order_profile(tmp_path, 1, done=0, steps=1)
    (blocked.directory / "learner-0.txt").mkdir()
    with Tracer(blocked, "learner-0"):
        pass
    assert "no profile: IsADirectoryError" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError), Tracer(blocked, "learner-0"):
        raise ZeroDivisionError


@pytest.mark.parametrize("step", [0, 2, 6])
def test_a_step_that_is_not_left_is_refused(tmp_path: Path, step: int) -> None:
    with pytest.raises(ConfigError, match=f"no step {step} to profile"):
        order_profile(tmp_path, step, done=2, steps=5)
    assert list(tmp_path.iterdir()) == []
