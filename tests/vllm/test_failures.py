"""What goes wrong with vLLM becomes a typed error, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from raygrpo.config import ModelSection
from raygrpo.engines.vllm.options import OURS, vllm_problem
from raygrpo.errors import ConfigError, InfraError, NumericError
from raygrpo.types import Version
from tests.vllm.engines import (
    ECHO,
    ROOT,
    STEP_DEADLINE,
    drawn_model,
    publish,
    request,
    run,
    start,
    step_until,
    vllm_processes,
)

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = list(range(3, 9))


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """On the embedded example's model, whose weights the run's seed draws; one thread."""
    made = start(ECHO, random_init=True)
    yield made
    made.close()


def test_random_weights_are_those_that_the_learner_draws(engine: Any) -> None:
    ids = torch.tensor(PROMPT)
    with torch.inference_mode():
        logprobs = drawn_model()(input_ids=ids[None]).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(-1, ids[1:, None])[:, 0]
    # Two layers in float32: only the order of sums differs.
    np.testing.assert_allclose(engine.score(PROMPT)[1:], expected, atol=1e-5)


def test_weights_that_are_no_numbers_are_a_numeric_error(engine: Any) -> None:
    model = drawn_model()
    broken = drawn_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    engine.load_weights(*publish(broken, Version(1, 1)))
    with pytest.raises(NumericError, match=r"not finite under version .*step=1"):
        run(engine, request(PROMPT))
    assert engine.num_unfinished == 0
    engine.load_weights(*publish(model, Version(1, 2)))
    assert len(run(engine, request(PROMPT))) == 3


def test_a_model_that_vllm_does_not_have_is_a_reason(tmp_path: Path) -> None:
    assert vllm_problem("cpu", ModelSection(path=str(ECHO))) is None
    assert vllm_problem("cuda", ModelSection(path=str(ECHO))) == "vLLM computes on cpu here"
    shape = json.loads((ECHO / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**shape, "architectures": ["OwnForCausalLM"]})
    )
    other = ModelSection(path=str(tmp_path))
    assert vllm_problem("cpu", other) == "vLLM does not have OwnForCausalLM"


def test_options_that_vllm_does_not_have_are_named() -> None:
    from raygrpo.engines.vllm.requests import engine_arguments

    model = ModelSection(path=str(ECHO))
    common: dict[str, Any] = {"seed": 0, "max_rows": 4, "device": "cpu"}
    with pytest.raises(ConfigError, match="has tensor_paralel_size, which vLLM does not know"):
        engine_arguments(model, **common, options={"tensor_paralel_size": 2})
    # What we set, a user's option may not: the check that needs no vLLM knows all of it.
    plain = engine_arguments(model, **common, options={})
    default = type(plain)(model=str(ECHO))
    ours = {n for n in vars(default) if getattr(plain, n) != getattr(default, n)}
    settable = {"max_model_len", "block_size", "kv_cache_memory_bytes", "enforce_eager"}
    assert ours - settable <= OURS


def test_the_death_of_vllms_core_is_an_infrastructure_error(engine: Any) -> None:
    engine.submit(request(PROMPT, max_tokens=40, min_tokens=40))
    step_until(engine, 1)
    for process in vllm_processes():
        process.kill()
    with pytest.raises(InfraError, match="vLLM"):
        while True:
            engine.step()
    with pytest.raises(InfraError, match="vLLM"):
        engine.load_weights(*publish(drawn_model(), Version(2, 0)))
    assert engine.version is None


OWNER = f"""
import time
from tests.vllm.engines import ECHO, start

if __name__ == "__main__":
    engine = start(ECHO, random_init=True)
    print("started", flush=True)
    time.sleep({STEP_DEADLINE})
"""


def test_vllms_processes_do_not_outlive_their_owner(tmp_path: Any) -> None:
    script = tmp_path / "owner.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{OWNER}")
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert any(line == "started\n" for line in owner.stdout)
        processes = vllm_processes(owner.pid)
        assert len(processes) >= 1
        owner.kill()
    _, left = psutil.wait_procs(processes, timeout=STEP_DEADLINE)
    # A container may have nobody who reaps the orphans.
    alive = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"{alive} outlived the process that started them"
