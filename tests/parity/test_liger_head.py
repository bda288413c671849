"""Liger's fused head against our own, on a CPU, where Liger computes in plain torch.

Its kernel for GPUs takes the same arguments; no machine with one has run these tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from raygrpo.algorithm import liger_head
from raygrpo.algorithm.logprobs import HeadSettings, LogitTransform, token_logprobs
from tests.parity.test_logprobs import assert_same, problem

CPU = torch.device("cpu")
# A scale and a temperature, which Liger knows as one.
SETTINGS = HeadSettings(chunk_tokens=9, temperature=1.3, transform=LogitTransform(scale=0.5))
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Documented:
    """Liger's function as its documentation has it, where Liger is not installed."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
    ) -> Any:
        table = torch.log_softmax((_input @ weight.T).float() / temperature, -1)
        loss = -table.gather(-1, target[:, None])[:, 0]
        return (loss, -(table.exp() * table).sum(-1)) if return_entropy else loss


@pytest.fixture(params=["installed", "documented"])
def liger(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "installed":
        pytest.importorskip("triton", reason="liger-kernel needs triton, which is not installed")
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
        return
    module = ModuleType("liger_kernel.ops")
    monkeypatch.setattr(
        module, "LigerFusedLinearScaledCrossEntropyFunction", Documented, raising=False
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)


@pytest.mark.usefixtures("liger")
def test_the_fused_head_gives_values_and_gradients_of_our_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = problem(40)
    ours = _values(given)
    monkeypatch.setattr(liger_head, "serves", lambda *_, **__: True)
    monkeypatch.setattr("raygrpo.algorithm.logprobs._HeadLogprobs", None)
    assert_same(_values(given), ours)


def _values(given: dict[str, Tensor]) -> list[Tensor]:
    """Values and gradients, without a bias."""
    hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
    logprobs, entropies = token_logprobs(
        hidden, weight, given["targets"], settings=SETTINGS, entropy_gradient=True
    )
    (logprobs @ given["by_logprob"] + entropies @ given["by_entropy"]).backward()
    return [logprobs.detach(), entropies.detach(), hidden.grad, weight.grad]  # type: ignore[list-item]


@pytest.mark.usefixtures("liger")
def test_entropies_of_the_fused_head_carry_a_gradient_only_where_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = problem(5)
    monkeypatch.setattr(liger_head, "serves", lambda *_, **__: True)
    hidden = given["hidden"].requires_grad_()
    for wanted in (False, True):
        logprobs, entropies = token_logprobs(
            hidden, given["weight"], given["targets"], settings=SETTINGS, entropy_gradient=wanted
        )
        assert logprobs.requires_grad
        assert entropies.requires_grad == wanted
        assert entropies.dtype == torch.float32


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_at_first_use_accepts_the_fused_head(dtype: torch.dtype) -> None:
    assert liger_head.disagreement(liger_head.fused_logprobs, CPU, dtype) is None


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Any:
    settings = HeadSettings(chunk_tokens=64, temperature=temperature)
    return token_logprobs(hidden, weight, targets, settings=settings, entropy_gradient=True)


def _fail(*_: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no such kernel")


CHANGES: dict[str, tuple[Change, str]] = {
    "sign": (lambda a, b: (-a, b), "differs"),
    "value": (lambda a, b: (a + 0.1 * a.detach(), b), "differs"),
    "no entropy gradient": (lambda a, b: (a, b.detach()), "differs"),
    "one token's gradient": (lambda a, b: (torch.cat([a[:75].detach(), a[75:]]), b), "differs"),
    "not a number": (lambda a, b: (a, b * float("nan")), "differs"),
    "failure": (_fail, "fails: RuntimeError: no such kernel"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_comparison_at_first_use_refuses_what_differs(name: str) -> None:
    change, reason = CHANGES[name]
    assert liger_head.disagreement(_ours, CPU, torch.bfloat16) is None
    found = liger_head.disagreement(lambda *given: change(*_ours(*given)), CPU, torch.bfloat16)
    assert found is not None
    assert found.startswith(reason)


def test_which_heads_the_kernel_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is read of tensors, so that none on a GPU is needed."""
    monkeypatch.setattr(liger_head, "_serves_device", lambda device: device.type == "cuda")

    def like(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, width: int = 128) -> Any:
        return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(9, width))

    plain: dict[str, Any] = {"bias": None, "cap": None, "fp32": False}
    assert liger_head.serves(like(), like(), **plain)
    assert not liger_head.serves(like("cpu"), like("cpu"), **plain)
    assert not liger_head.serves(like(dtype=torch.float32), like(dtype=torch.float32), **plain)
    assert not liger_head.serves(like(width=100), like(width=100), **plain)
    for name, value in (("bias", like()), ("cap", 30.0), ("fp32", True)):
        assert not liger_head.serves(like(), like(), **(plain | {name: value}))


@pytest.mark.parametrize("case", ["other GPU", "not installed", "agrees", "differs"])
def test_which_devices_it_serves(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The choice and what the log says of it; the comparison itself is tested above."""
    liger_head._serves_device.cache_clear()
    capability = (8, 0) if case == "other GPU" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    installed = None if case == "not installed" else "somewhere"
    monkeypatch.setattr(liger_head, "find_spec", lambda _: installed)
    reason = "differs by much" if case == "differs" else None
    monkeypatch.setattr(liger_head, "disagreement", lambda *_: reason)
    caplog.set_level("INFO")
    for _ in range(2):
        assert liger_head._serves_device(torch.device("cuda")) == (case == "agrees")
    expected = {
        "agrees": ["language head: Liger's fused kernel"],
        "differs": ["language head: raygrpo's own, since Liger's fused kernel differs by much"],
    }
    assert [r.getMessage() for r in caplog.records] == expected.get(case, [])
    liger_head._serves_device.cache_clear()
