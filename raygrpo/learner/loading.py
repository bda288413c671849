"""Which rows a model computes as it computes samples in rows of their own: found by comparing."""

from __future__ import annotations

import copy
import logging
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygrpo.algorithm.packing import RowLayout
from raygrpo.config import ModelSection
from raygrpo.errors import ConfigError
from raygrpo.learner.attention.segments import use_segments
from raygrpo.learner.inputs import TreeLayout, tree_layout
from raygrpo.learner.policy import PolicyModel
from raygrpo.models import load_model

log = logging.getLogger(__name__)

PROMPT, COMPLETIONS = 7, (5, 4)
# fp32 rounding of two orders of summation stays below 1e-5 of the largest logit, while a forgotten
# cap, scale or mask shows in the second or third digit.
TOLERANCE = 1e-4


@torch.no_grad()
def find_layout(model: Any) -> RowLayout:
    """The layout that saves most and gives the logits of an fp32 model's own forward.

    Leaves the model's attention as it is for the layout found; says in the log what is given up.

    Raises:
        ConfigError: not even plain rows give its logits.
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
    """What `find_layout` will most likely find for a text configuration, without its weights.

    Attention by segment knows neither capped logits (Gemma 2) nor sinks (gpt-oss).
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "shared" if capped or config.model_type == "gpt_oss" else "packed"


def _try_layout(policy: PolicyModel, rows: list[Tensor], expected: list[Tensor]) -> str | None:
    """Why a layout cannot be used; None when it can."""
    try:
        found = _packed_logits(policy, rows)
    except (ConfigError, TypeError, ValueError, RuntimeError, KeyError) as error:
        # Which layers take what a layout needs only shows when it is given.
        return str(error)
    wanted = [*(logits[PROMPT - 1 :] for logits in expected), expected[0]]
    if all(_close(a, b) for a, b in zip(found, wanted, strict=True)):
        return None
    return "their logits differ from those of separate rows"


def _make_rows(vocabulary: int) -> list[Tensor]:
    tokens = torch.arange(1, 1 + PROMPT + sum(COMPLETIONS)) * 7919 % vocabulary
    prompt, *completions = torch.split(tokens, [PROMPT, *COMPLETIONS])
    return [torch.cat([prompt, completion]) for completion in completions]


def _packed_logits(policy: PolicyModel, rows: list[Tensor]) -> list[Tensor]:
    """One padded row: a prompt with its completions, and the first sample once more by itself.

    The logits of each completion from the prompt's last token on, and those of that sample.
    """
    tails = [row[PROMPT:] for row in rows]
    parts = [rows[0][:PROMPT], *tails, rows[0]]
    lengths = [len(part) for part in parts]
    starts = [0, *(PROMPT for _ in tails), 0]
    parents = [-1, *(0 for _ in tails), -1]
    tokens = torch.cat([*parts, torch.zeros(1, dtype=torch.long)])
    layout = _layout(lengths, starts, parents)
    logits = policy.logprob_head.logits(policy.hidden(tokens[None], layout))[0]
    edges = [0, *accumulate(lengths)]
    prompt, *rest, alone = (logits[a:b] for a, b in pairwise(edges))
    return [*(torch.cat([prompt[-1:], tail]) for tail in rest), alone]


def _layout(lengths: list[int], starts: list[int], parents: list[int]) -> TreeLayout:
    """Segments one after the other in one row, and a padding token."""
    positions = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    arrays = (
        np.concatenate([*positions, [0]]),
        np.repeat([*range(len(lengths)), -1], [*lengths, 1]),
        np.repeat([*parents, -1], [*lengths, 1]),
    )
    position, segment, parent = (array.astype(np.int32)[None] for array in arrays)
    return tree_layout(position, segment, parent, torch.device("cpu"))


def _close(ours: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return float((ours - expected).abs().max()) <= TOLERANCE * scale


def load_policy(
    section: ModelSection,
    *,
    seed: int,
    dtype: torch.dtype,
    temperature: float,
    gradient_checkpointing: bool = False,
) -> PolicyModel:
    """Loads the policy on CPU and probes that it computes what the Hugging Face model computes.

    Raises:
        ConfigError: the model does not load, keeps parameters in several dtypes, or makes its
            logits in a way that is not known here.
    """
    model = load_model(section, seed=seed, dtype=dtype)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds != {dtype}:
        raise ConfigError(
            f"{section.path!r} keeps parameters in {sorted(map(str, kinds))}, not only in {dtype}",
            "set model.dtype: float32",
        )
    from raygrpo.learner.loading import find_layout

    # The comparison is of exact mathematics: bfloat16's rounding would hide a real difference.
    probed = model if dtype == torch.float32 else copy.deepcopy(model).float()
    layout = find_layout(probed)
    if layout == "packed":
        use_segments(model)
    return PolicyModel(
        model,
        temperature=temperature,
        layout=layout,
        fp32_head=section.fp32_head,
        gradient_checkpointing=gradient_checkpointing,
    )
