"""Two workers that hold half of each layer: the same numbers, updated together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from raygrpo.errors import InfraError
from raygrpo.types import Version
from tests.tiny import forced
from tests.vllm.engines import (
    ECHO,
    drawn_model,
    perturbed,
    publish,
    request,
    run,
    start,
    vllm_processes,
)

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = list(range(3, 9))
# Float32 over two layers, in which the halves' sums are added last; other weights differ by 0.01.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    made = start(ECHO, tensor_parallel_size=2, random_init=True)
    yield made
    made.close()


def test_each_worker_takes_its_part_of_an_update(engine: Any) -> None:
    assert sum(process.name().startswith("VLLM::Worker") for process in vllm_processes()) == 2
    model = drawn_model()
    for step in range(3):
        item = request(PROMPT, max_tokens=16, min_tokens=16)
        for completion in run(engine, item):
            np.testing.assert_allclose(
                completion.logprobs, forced(model, item, completion), rtol=0, atol=TOLERANCE
            )
        before = engine.score(PROMPT)
        perturbed(model, step)
        engine.load_weights(*publish(model, Version(1, step)))
        assert np.abs(engine.score(PROMPT) - before).max() > 100 * TOLERANCE


def test_a_dead_worker_is_an_infrastructure_error(engine: Any) -> None:
    model = drawn_model()
    for process in vllm_processes():
        if process.name().startswith("VLLM::Worker_TP1"):
            process.kill()
    with pytest.raises(InfraError, match="the generator is replaced"):
        engine.load_weights(*publish(model, Version(2, 0)))
    assert engine.version is None
