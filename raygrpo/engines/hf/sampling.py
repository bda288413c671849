"""From logits to tokens: the sampled distribution, its logprobs, and inverse-CDF sampling.

Settings act in the order of transformers' logits processors: repetition penalty, forbidden stops,
temperature, top-k, top-p, min-p. Each stage sets what it removes to -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygrpo.types import Sampling

BLOCK = 512


def sample(
    logits: Tensor,  # [R, V] float32
    sampling: Sampling,
    uniforms: Tensor,  # [R] float64 in [0, 1)
    *,
    history: Tensor | None = None,
    early: Tensor | None = None,
    stop_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [R] and their logprobs [R] (nats, float32) under the distribution sampled from.

    ``history`` [R, H] are the ids that the repetition penalty counts as seen (repeats are
    harmless); rows that are ``early`` [R] draw none of ``stop_ids`` [S]. Temperature 0 takes the
    likeliest token, with logprob 0.
    """
    scores = penalise(logits, history, sampling.repetition_penalty)
    if early is not None and stop_ids is not None:
        scores = scores.clone()
        scores[:, stop_ids] = scores[:, stop_ids].masked_fill(early[:, None], -torch.inf)
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    return draw(truncate(scores, sampling), uniforms)


def penalise(logits: Tensor, history: Tensor | None, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of seen ids by ``penalty`` (CTRL, 2019)."""
    if history is None or penalty == 1:
        return logits
    seen = logits.gather(-1, history)
    return logits.scatter(-1, history, torch.where(seen < 0, seen * penalty, seen / penalty))


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Scores [R, V] after temperature, top-k, top-p and min-p; -inf for removed ids."""
    scores = logits if sampling.temperature == 1 else logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        scores = _nucleus(scores, sampling.top_p)
    if sampling.min_p > 0:
        probs = scores.softmax(-1)
        least = probs.amax(-1, keepdim=True) * sampling.min_p
        scores = scores.masked_fill(probs < least, -torch.inf)
    return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of likeliest tokens whose mass is at least ``top_p``."""
    ordered, ids = scores.sort(-1)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(-1, ids, removed), -torch.inf)


def draw(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one id a row from softmax(scores) by inverting its cumulative distribution.

    Returns ids [R] and logprobs [R]. The id is the first whose cumulative mass exceeds
    ``uniform * total``, so its own mass is never zero. The search goes through the sums of blocks
    of ids, then through one block: running sums over a whole vocabulary take much longer.
    """
    top = scores.amax(-1, keepdim=True)
    mass = (scores - top).exp_()
    cumulative = _block_sums(mass).cumsum(-1)
    total = cumulative[:, -1:]
    block, rest = _first_above(cumulative, (uniforms[:, None] * total).to(total.dtype))
    within = block * BLOCK + torch.arange(BLOCK, device=scores.device)
    inside = within < scores.shape[-1]
    part = mass.gather(-1, within.clamp(max=scores.shape[-1] - 1)).masked_fill_(~inside, 0)
    place, _ = _first_above(part.cumsum(-1), rest)
    ids = block * BLOCK + place
    logprobs = scores.gather(-1, ids) - top - total.log()
    return ids[:, 0], logprobs[:, 0]


def _block_sums(mass: Tensor) -> Tensor:
    whole = mass.shape[-1] // BLOCK
    sums = mass[:, : whole * BLOCK].reshape(len(mass), whole, BLOCK).sum(-1)
    rest = mass[:, whole * BLOCK :]
    return torch.cat([sums, rest.sum(-1, keepdim=True)], -1) if rest.shape[-1] else sums


def _first_above(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place [R, 1] whose sum exceeds ``target`` [R, 1], and target minus the sum before.

    The target is kept below the last sum, which rounding could reach.
    """
    last = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(cumulative, target, right=True)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, place)
    return place, target - before
