"""Which engine a run has: configured, as it began, or vLLM where it works."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.config import RunConfig
from raygrpo.engines import select as choose
from raygrpo.engines.select import (
    EngineChoice,
    check_engine,
    choose_engine,
    engine_device,
    planned_engine,
)
from raygrpo.engines.vllm.options import NOT_INSTALLED, vllm_problem
from raygrpo.errors import ConfigError
from tests import builders


def with_engine(engine: str, **generators: Any) -> RunConfig:
    return builders.config(generators={"engine": engine, **generators})


def never() -> str | None:
    raise AssertionError("vLLM was tried although the answer was known")


def test_a_named_engine_is_taken_without_trying_anything() -> None:
    assert choose_engine(with_engine("vllm"), None, never).engine == "vllm"
    assert choose_engine(with_engine("transformers"), None, never).engine == "transformers"


def test_auto_takes_vllm_where_it_works_and_says_why_it_did_not() -> None:
    assert builders.config().generators.engine == "auto"
    assert choose_engine(builders.config(), None, lambda: None).engine == "vllm"
    choice = choose_engine(builders.config(), None, lambda: NOT_INSTALLED)
    assert (choice.engine, choice.reason) == ("transformers", NOT_INSTALLED)


@pytest.mark.parametrize(("max_rows", "expected"), [(4, 8), (32, 32)])
def test_vllm_has_rows_for_a_whole_group(
    monkeypatch: pytest.MonkeyPatch, max_rows: int, expected: int
) -> None:
    """Its completions would else wait inside vLLM, and the probe with them."""
    given: dict[str, Any] = {}
    module = SimpleNamespace(VllmEngine=lambda _, **options: given.update(options))
    monkeypatch.setattr(choose, "vllm_problem", lambda _: None)
    monkeypatch.setitem(sys.modules, "raygrpo.engines.vllm.engine", module)  # type: ignore[arg-type]
    config = builders.config(
        generators={"engine": "vllm", "max_rows": max_rows}, sampling={"num_completions": 8}
    )
    choose.make_engine(config, threads=1, version=None)
    assert given["max_rows"] == expected


def test_deterministic_runs_never_take_vllm() -> None:
    assert choose_engine(builders.config(deterministic=True), None, never).engine == "transformers"
    fixed = builders.config(deterministic=True, generators={"engine": "vllm"})
    with pytest.raises(ConfigError, match="deterministic: true needs"):
        check_engine(fixed)


@pytest.mark.parametrize("recorded", ["transformers", "vllm"])
def test_a_resumed_run_keeps_its_engine(recorded: str) -> None:
    assert choose_engine(builders.config(), recorded, never).engine == recorded
    assert choose_engine(with_engine(recorded), recorded, never).engine == recorded
    other = "vllm" if recorded == "transformers" else "transformers"
    with pytest.raises(ConfigError, match=f"began with the engine {recorded}.*engine is {other}"):
        choose_engine(with_engine(other), recorded, never)


def test_options_are_refused_where_they_cannot_hold() -> None:
    check_engine(with_engine("vllm", options={"enforce_eager": True}))
    check_engine(with_engine("auto", options={"enforce_eager": True}))
    with pytest.raises(ConfigError, match="vLLM's, but"):
        check_engine(with_engine("transformers", options={"enforce_eager": True}))
    with pytest.raises(ConfigError, match="may not set logprobs_mode, seed"):
        check_engine(with_engine("vllm", options={"seed": 1, "logprobs_mode": "raw_logprobs"}))


def test_tensor_parallelism_needs_as_many_gpus() -> None:
    sections: dict[str, Any] = {
        "generators": {"engine": "vllm", "options": {"tensor_parallel_size": 2}},
        "ray": {"gpus": {"generator": 1}},
    }
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2"):
        check_engine(builders.config(**sections))
    sections["ray"] = {"gpus": {"generator": 2}}
    check_engine(builders.config(**sections))
    assert engine_device(builders.config(**sections)) == "cuda"


def test_a_vllm_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raygrpo.engines.vllm.options.find_spec", lambda name: None)
    assert vllm_problem("cpu") == NOT_INSTALLED
    assert planned_engine(builders.config()) == EngineChoice(
        engine="transformers", reason=NOT_INSTALLED
    )
    monkeypatch.setattr("raygrpo.engines.vllm.options.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "raygrpo.engines.vllm.requests", None)
    problem = vllm_problem("cpu")
    assert problem is not None and problem.startswith("vLLM does not import: ")
    assert planned_engine(builders.config()).engine == "vllm"


def test_the_choice_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; import raygrpo.engines.select; "
        "sys.exit(any(name in sys.modules for name in ('vllm', 'torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
