"""Loading the policy, and finding the row layout that its model computes rightly.

A model shares prompts or packs rows only after a comparison: its logits in such a row must be those
of the same samples in rows of their own.
"""

from __future__ import annotations

import copy
import logging
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raygrpo.algorithm.packing import RowLayout
from raygrpo.config import ModelSection
from raygrpo.errors import ConfigError
from raygrpo.learner.attention.flex import row_arrays
from raygrpo.learner.attention.segments import use_segments
from raygrpo.learner.inputs import tree_layout
from raygrpo.learner.policy import PolicyModel
from raygrpo.models import load_model

if TYPE_CHECKING:
    from jaxtyping import Float, Int

log = logging.getLogger(__name__)

PROMPT, COMPLETIONS = 7, (5, 4)
# fp32 rounding of two orders of summation stays below 1e-5 of the largest logit, while a forgotten
# cap, scale or mask shows in the second or third digit.
TOLERANCE = 1e-4


@torch.no_grad()
def find_layout(model: Any) -> RowLayout:
    """The layout that saves most and gives the logits of an fp32 model's own forward.

    The model keeps the attention function of the layout found. The log names layouts that the model
    does not compute rightly.

    Raises:
        ConfigError: not even plain rows give the model's logits.
    """
    vocabulary = model.config.get_text_config().vocab_size
    rows = _make_rows(vocabulary)
    expected = [model(row[None], use_cache=False).logits.float()[0] for row in rows]
    plain = PolicyModel(model, layout="plain")
    ours = [plain.logprob_head.logits(plain.hidden(row[None], None))[0] for row in rows]
    kind = model.config.model_type
    if not all(_close(a, b) for a, b in zip(ours, expected, strict=True)):
        raise ConfigError(
            f"models of type {kind!r} make their logits in a way that raygrpo does not know",
            "use another model type, or report this one",
        )
    own = model.config._attn_implementation
    layouts: tuple[RowLayout, ...] = ("packed", "shared")
    for layout in layouts:
        if layout == "packed":
            use_segments(model)
        else:
            model.set_attn_implementation(own)
        reason = _try_layout(PolicyModel(model, layout=layout), rows, expected)
        if reason is None:
            return layout
        lost = "attend by segment" if layout == "packed" else "share prompts"
        log.warning("training rows of models of type %r do not %s: %s", kind, lost, reason)
    return "plain"


def expected_layout(config: Any) -> RowLayout:
    """The layout that `find_layout` will most likely find, from a text configuration alone.

    Attention by segment knows neither capped logits (Gemma 2) nor sinks (gpt-oss).
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "shared" if capped or config.model_type == "gpt_oss" else "packed"


def _try_layout(
    policy: PolicyModel, rows: list[Int[Tensor, "T"]], expected: list[Float[Tensor, "T V"]]
) -> str | None:
    """The reason why the policy's layout cannot be used; None when it can."""
    try:
        found = _packed_logits(policy, rows)
    except (ConfigError, TypeError, ValueError, RuntimeError, KeyError) as error:
        # A layer that does not take the layout's masks shows this only in a forward pass.
        return str(error)
    wanted = [*(logits[PROMPT - 1 :] for logits in expected), expected[0]]
    if all(_close(a, b) for a, b in zip(found, wanted, strict=True)):
        return None
    return "their logits differ from those of separate rows"


def _make_rows(vocabulary: int) -> list[Int[Tensor, "T"]]:
    """One row per completion, each behind the same prompt."""
    tokens = torch.arange(1, 1 + PROMPT + sum(COMPLETIONS)) * 7919 % vocabulary
    prompt, *completions = torch.split(tokens, [PROMPT, *COMPLETIONS])
    return [torch.cat([prompt, completion]) for completion in completions]


def _packed_logits(policy: PolicyModel, rows: list[Int[Tensor, "T"]]) -> list[Float[Tensor, "T V"]]:
    """The logits of the rows, packed into one padded row.

    The packed row holds the prompt with its completions, and the first sample once more by itself.
    Returned are the logits of each completion from the prompt's last token on, then the sample's.
    """
    tails = [row[PROMPT:] for row in rows]
    tokens = torch.cat([rows[0][:PROMPT], *tails, rows[0], torch.zeros(1, dtype=torch.long)])
    parts = [(0, PROMPT, -1), *((PROMPT, len(tail), 0) for tail in tails), (0, len(rows[0]), -1)]
    positions, segments, parents = row_arrays(parts, padding=1)
    layout = tree_layout(positions, segments, parents, torch.device("cpu"))
    logits = policy.logprob_head.logits(policy.hidden(tokens[None], layout))[0]
    edges = [0, *accumulate(size for _, size, _ in parts)]
    prompt, *rest, alone = (logits[a:b] for a, b in pairwise(edges))
    return [*(torch.cat([prompt[-1:], tail]) for tail in rest), alone]


def _close(ours: Float[Tensor, "T V"], expected: Float[Tensor, "T V"]) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return float((ours - expected).abs().max()) <= TOLERANCE * scale


def load_policy(
    section: ModelSection,
    *,
    seed: int,
    dtype: torch.dtype,
    temperature: float,
    entropy_gradient: bool = False,
    gradient_checkpointing: bool = False,
) -> PolicyModel:
    """Loads the policy on the CPU, in the best layout that gives the Hugging Face model's logits.

    Raises:
        ConfigError: the model does not load, has parameters in several dtypes, or makes its logits
            in an unknown way.
    """
    model = load_model(section, seed=seed, dtype=dtype)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds != {dtype}:
        raise ConfigError(
            f"{section.path!r} keeps parameters in {sorted(map(str, kinds))}, not only in {dtype}",
            "set model.dtype: float32",
        )
    # In float32: bfloat16's rounding would hide a real difference.
    probed = model if dtype == torch.float32 else copy.deepcopy(model).float()
    layout = find_layout(probed)
    if layout == "packed":
        use_segments(model)
    return PolicyModel(
        model,
        temperature=temperature,
        layout=layout,
        fp32_head=section.fp32_head,
        entropy_gradient=entropy_gradient,
        gradient_checkpointing=gradient_checkpointing,
    )
