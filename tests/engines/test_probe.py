"""The probe that follows each sync: what passes, what is refused, and what it compares."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.config.file import load_config
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.engines.probe import FIRST_LIMIT, FLOORS, ProbeCheck
from raygrpo.errors import InfraError, NumericError, ProbeFailed
from raygrpo.learner.probe import score_probe
from raygrpo.models import load_model
from raygrpo.types import Version
from raygrpo.weights.buckets import make_version
from raygrpo.weights.probe import PROBE_LENGTH, probe_tokens
from raygrpo.weights.types import Probe
from tests import runs
from tests.parity.reference_learner import ReferenceLearner

VERSION = Version(1, 3)
PROBE = Probe(token_ids=(5, 6, 7, 8, 9), logprobs=(0.0, -1.0, -2.0, -3.0, -4.0))


class Answers:
    """An engine as far as the probe sees it: the probe's logprobs, each off by ``gap``."""

    def __init__(self) -> None:
        self.gap = 0.0

    def score(self, token_ids: Any, temperature: float) -> Any:
        assert temperature == 0.7
        return np.array(PROBE.logprobs, np.float32) - np.array([0, *[self.gap] * 4], np.float32)


def gaps(check: ProbeCheck, *values: float) -> list[float]:
    engine, seen = Answers(), []
    for value in values:
        engine.gap = value
        seen.append(check.check(engine, PROBE, VERSION))  # type: ignore[arg-type]
    return seen


@given(
    st.sampled_from(sorted(FLOORS)),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 2).filter(lambda x: abs(x - 1) > 1e-3),
)
def test_tolerance_is_three_normal_gaps_and_no_less_than_the_floor(
    dtype: str, first: float, later: float
) -> None:
    """``first`` and ``later`` in units of what is allowed for each."""
    check = ProbeCheck(dtype, 0.7)
    allowed_first = FIRST_LIMIT * FLOORS[dtype]
    (gap,) = gaps(check, 0.99 * first * allowed_first)
    assert check.normal_gap == gap
    allowed = max(3 * gap, FLOORS[dtype])
    assert check.tolerance == allowed
    if later < 1:
        gaps(check, later * allowed)
    else:
        with pytest.raises(ProbeFailed) as caught:
            gaps(check, later * allowed)
        assert caught.value.figures["gap"] == pytest.approx(later * allowed, rel=1e-3)
    assert check.normal_gap == gap, "a later gap never widens the tolerance"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), FIRST_LIMIT * FLOORS["float32"] * 1.1])
def test_a_first_version_may_be_wrong_too(bad: float) -> None:
    check = ProbeCheck("float32", 0.7)
    with pytest.raises(ProbeFailed):
        gaps(check, bad)
    assert check.normal_gap is None
    with pytest.raises(ProbeFailed):
        gaps(check, bad)


def test_a_failed_probe_names_its_figures_wherever_it_is_read() -> None:
    error = pickle.loads(pickle.dumps(ProbeFailed(VERSION, 0.25, 0.05)))
    assert isinstance(error, ProbeFailed)
    assert issubclass(ProbeFailed, InfraError)
    assert error.figures == {"version": (1, 3), "gap": 0.25, "tolerance": 0.05}
    assert "(1, 3)" in str(error)
    assert "0.25" in str(error)
    assert "0.05" in str(error)


def test_the_sequence_is_the_runs_own() -> None:
    assert probe_tokens(100, 1) == probe_tokens(100, 1)
    assert len({probe_tokens(100, 1), probe_tokens(100, 2), probe_tokens(101, 1)}) == 3
    assert set(probe_tokens(3, 1)) <= {0, 1, 2}
    # A model of few positions gets a shorter one.
    assert len(probe_tokens(100, 1)) == PROBE_LENGTH > 5
    assert len(probe_tokens(100, 1, 5)) == 5


def test_learner_and_engine_agree_until_a_weight_differs(tmp_path: Path) -> None:
    config = load_config(runs.write_run(tmp_path, "run", sampling={"temperature": 0.8}))
    learner = ReferenceLearner(config)
    state = torch.random.get_rng_state()
    probe = score_probe(learner)
    assert torch.equal(torch.random.get_rng_state(), state)
    # Against transformers itself.
    model = load_model(config.model, seed=0, dtype=torch.float32)
    ids = torch.tensor([probe.token_ids])
    with torch.no_grad():
        logprobs = (model(ids).logits[0, :-1] / 0.8).log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, 1:, None])[:, 0].numpy()
    # Two orders of summation in fp32.
    np.testing.assert_allclose(probe.logprobs[1:], expected, atol=1e-5)

    engine = TransformersEngine(config.model, seed=0, max_rows=4, deterministic=False)
    engine.load_weights(*make_version(VERSION, learner.named_weights()))
    check = ProbeCheck("float32", 0.8)
    assert check.check(engine, probe, VERSION) < 1e-5
    # One norm of one layer, by 1 %: bytes arrived, but not their effect.
    engine.weights.targets["model.layers.1.input_layernorm.weight"].mul_(1.01)
    with pytest.raises(ProbeFailed):
        check.check(engine, probe, VERSION)


def test_weights_that_compute_no_numbers_are_not_published(tmp_path: Path) -> None:
    """Every generator would be replaced for them, one after the other."""
    learner = ReferenceLearner(load_config(runs.write_run(tmp_path, "run")))
    with torch.no_grad():
        next(learner.hf_model.parameters()).fill_(torch.inf)
    with pytest.raises(NumericError, match="logprobs that are not finite"):
        score_probe(learner)
