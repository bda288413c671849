"""The embedded example with vLLM generating: its reward rises, and the run keeps its engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests import runs

ROOT = Path(__file__).parents[2]
DEADLINE_S = 600.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(DEADLINE_S)]


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as it is shipped but for one learner rank; vLLM is what ``auto`` finds."""
    directory = tmp_path_factory.mktemp("echo")
    config = yaml.safe_load((ROOT / "examples" / "echo" / "config.yaml").read_text())
    config |= {"run_dir": str(directory / "run"), "learner": {"num_ranks": 1, "zero_stage": 1}}
    config["eval"] |= {"eval_steps": 60}
    config["tracking"] = {"wandb": "disabled"}
    path = directory / "echo.yaml"
    path.write_text(yaml.safe_dump(config))
    process = runs.start(path)
    process.wait(timeout=DEADLINE_S)
    output = runs.finish(process, path)
    assert "engine: name vllm, reason vLLM is installed and loads" in output
    return path


def test_the_reward_rises(echo: Path) -> None:
    steps = runs.metrics(echo)
    greedy = {r["step"]: r["eval/greedy/reward"] for r in steps if "eval/greedy/reward" in r}
    # As with the embedded engine (tests/e2e/test_echo.py): from nothing to nearly all.
    assert greedy[0] < 0.2
    assert greedy[60] > 0.9
    assert all(row["ledger/unexplained"] == 0 for row in steps[1:])


def test_the_generator_held_the_weights_that_were_trained(echo: Path) -> None:
    name = "sampling/sampling_logp_difference/max"
    gaps = [row[name] for row in runs.metrics(echo) if name in row]
    assert len(gaps) > 30
    # Float32 on both sides. One update at this learning rate moves logprobs by 1e-2 and more.
    assert max(gaps) < 1e-3


def test_the_engine_is_recorded_and_kept(echo: Path) -> None:
    facts = json.loads((runs.run_dir(echo) / "run.json").read_text())
    assert facts["engine"] == "vllm"
    other = echo.with_name("other.yaml")
    config = yaml.safe_load(echo.read_text())
    config["generators"] = {"engine": "transformers"}
    config["train"]["steps"] += 1
    other.write_text(yaml.safe_dump(config))
    output = runs.run(other, expected=2)
    assert "began with the engine vllm, but generators.engine is transformers" in output
