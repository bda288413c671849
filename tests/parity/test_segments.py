"""Packed rows and attention by segment: against dense attention, and against separate rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.algorithm.loss import Aggregation, loss_weights_for
from raygrpo.algorithm.packing import RowLayout, make_microbatch, place
from raygrpo.config import ModelSection
from raygrpo.learner.attention.segments import SegmentAttention
from raygrpo.learner.inputs import tree_layout
from raygrpo.learner.loading import expected_layout, find_layout, load_policy
from raygrpo.types import Group, Microbatch, PlannedSample, StepBatch
from tests.algorithm.loss_cases import (
    AGGREGATIONS,
    BESIDE,
    CORRECTIONS,
    LOSSES,
    options_for,
    sides_of,
)
from tests.builders import completion, group, request
from tests.close import relative
from tests.parity.conftest import KINDS
from tests.parity.learner_cases import VOCABULARY, make_config
from tests.parity.reference_learner import ReferenceLearner

LAYOUTS: tuple[RowLayout, ...] = ("plain", "shared", "packed")
CPU = torch.device("cpu")
# fp32 sums in another order (other shapes of matrix products).
RELATIVE = 1e-5

Lengths = list[tuple[int, list[int]]]
GROUPS = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 14), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def make_groups(
    lengths: Lengths, seed: int, aggregation: Aggregation = "token"
) -> tuple[tuple[PlannedSample, ...], dict[int, Group]]:
    """Groups (prompt length, completion lengths) of random tokens, masks and advantages."""
    random = np.random.default_rng(seed)
    samples: list[PlannedSample] = []
    payloads = {}
    for group_id, (prompt, completions) in enumerate(lengths):
        members = []
        for index, size in enumerate(completions):
            mask = random.random(size) < 0.8
            mask[-1] = True
            # About the models' own mean, so that ratios to the sampler are on either side of 1.
            logprobs = random.normal(-5, 1, size).tolist()
            members.append(
                completion(random.integers(3, VOCABULARY, size).tolist(), logprobs, mask.tolist())
            )
            samples.append(
                PlannedSample(
                    group_id=group_id,
                    completion_index=index,
                    prompt_length=prompt,
                    completion_length=size,
                    num_loss_tokens=int(mask.sum()),
                    advantage=float(random.normal()),
                    loss_weight=0.0,
                )
            )
        order = request(
            group_id,
            num_completions=len(completions),
            tokens=random.integers(3, VOCABULARY, prompt).tolist(),
        )
        payloads[group_id] = group(order, members)
    weights = loss_weights_for(
        aggregation,
        [sample.num_loss_tokens for sample in samples],
        [sample.group_id for sample in samples],
        max_completion_length=16,
    )
    weighed = zip(samples, weights.tolist(), strict=True)
    return tuple(replace(sample, loss_weight=weight) for sample, weight in weighed), payloads


def microbatches(
    samples: tuple[PlannedSample, ...], payloads: dict[int, Group], layout: RowLayout, budget: int
) -> list[Microbatch]:
    batch = StepBatch(step=0, minibatches=(samples,), payloads=dict.fromkeys(payloads), versions={})
    ((plans,),) = place(batch, 1, tokens_per_microbatch=budget, layout=layout)
    return [make_microbatch(plan, payloads) for plan in plans]


class Recorder(ReferenceLearner):
    """Keeps the gradient of each update."""

    def __init__(self, path: Path, layout: RowLayout, **sections: Any) -> None:
        super().__init__(make_config(path, **sections), layout=layout)
        self.gradients: list[Tensor] = []

    def _apply(self, lr: float) -> float:
        parameters = self._policy.parameters()
        flat = [p.grad.flatten().clone() for p in parameters if p.grad is not None]
        self.gradients.append(torch.cat(flat))
        return super()._apply(lr)


@pytest.fixture(scope="module")
def still(models: dict[str, Path]) -> dict[tuple[str, RowLayout], Recorder]:
    """Learners whose weights stay as they are."""
    return {
        (kind, layout): Recorder(models[kind], layout, optimizer={"lr": 0})
        for kind in KINDS
        for layout in LAYOUTS
    }


# Each loss in each aggregation, beside another of what may stand beside it.
CASES = [
    (loss, sides_of(loss)[(i + 3 * j) % len(sides_of(loss))], aggregation)
    for i, loss in enumerate(LOSSES)
    for j, aggregation in enumerate(AGGREGATIONS)
]


def test_all_that_acts_beside_a_loss_is_among_the_cases() -> None:
    beside = Counter(name for _, name, _ in CASES)
    assert set(beside) == {*BESIDE, *CORRECTIONS}
    assert all(beside[name] > 1 for name in CORRECTIONS)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(CASES[i]))
def test_every_loss_teaches_the_same_in_all_layouts(case: int, models: dict[str, Path]) -> None:
    """Two minibatches, so that old logprobs are those of a pass before; gradients of both."""
    loss, beside, aggregation = CASES[case]
    section = options_for(loss, beside, aggregation)
    del section["max_completion_length"]
    if "correction" in section:
        # The model knows nothing of the sampler: its ratios are far from 1.
        section |= {"correction_min": 0.05, "correction_max": 20.0}
    # A loss without a ratio is right for one update a step.
    count = 1 if loss == "reinforce" else 2
    lengths: list[Lengths] = [
        [(9, [7, 3, 12]), (4, [5, 9]), (15, [2, 8, 1, 6])],
        [(3, [11, 4]), (12, [6, 6, 2])],
    ]
    made = [make_groups(part, seed, aggregation) for seed, part in enumerate(lengths)]  # type: ignore[arg-type]
    kind = KINDS[case % len(KINDS)]
    gradients, losses = [], []
    for layout in LAYOUTS:
        learner = Recorder(
            models[kind],
            layout,
            loss=section,
            train={"num_minibatches": count, "groups_per_step": 2},
        )
        stats = learner.update([microbatches(*groups, layout, 64) for groups in made[:count]])
        gradients.append(learner.gradients)
        losses.append(stats["loss"].sum)
    for layout in (1, 2):
        assert losses[layout] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
        # Three times: a KL's first gradient is rounding alone, times ratios to the sampler of up to
        # 25. Measured: 1.3 times.
        assert relative(gradients[layout][0], gradients[0][0]) < 3 * RELATIVE
        # The second update starts from weights that Adam moved by rounding, too.
        assert relative(gradients[layout][-1], gradients[0][-1]) < 100 * RELATIVE


@pytest.mark.parametrize("kind", KINDS)
@given(lengths=GROUPS, budget=st.integers(1, 150), seed=st.integers(0, 99))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_lengths_in_any_budget_teach_the_same(
    kind: str,
    lengths: Lengths,
    budget: int,
    seed: int,
    still: dict[tuple[str, RowLayout], Recorder],
) -> None:
    made = make_groups(lengths, seed)
    found = []
    for layout, size in zip(LAYOUTS, (10**6, budget, budget), strict=True):
        learner = still[kind, layout]
        learner.update([microbatches(*made, layout, size)])
        found.append(learner.gradients.pop())
    assert relative(found[1], found[0]) < RELATIVE
    assert relative(found[2], found[0]) < RELATIVE


class Layer(torch.nn.Module):
    """What `SegmentAttention` reads of an attention layer in the plain case."""

    num_key_value_groups = 2
    is_causal = True


@given(
    rows=st.lists(GROUPS, min_size=1, max_size=3),
    window=st.sampled_from([None, 3, 10]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_attention_by_segment_equals_dense_attention(
    rows: list[Lengths], window: int | None, seed: int
) -> None:
    """In float64, from the definition: who sees whom, softmax over those, weighted values."""
    arrays = segment_arrays(rows)
    layout = tree_layout(*arrays, CPU)
    allowed = layout.allowed()
    distance = layout.positions[:, :, None] - layout.positions[:, None, :]
    if window is not None:
        allowed = allowed & (distance < window)
    real = layout.segment_ids >= 0
    generator = torch.Generator().manual_seed(seed)
    shape = (*real.shape, 4, 8)
    query, key, value, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    upstream[~real] = 0
    results = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (query, key[:, :, :2], value[:, :, :2])]
        q, k, v = (t.transpose(1, 2) for t in leaves)
        if ours:
            mark = torch.zeros(1).expand(1, 1, 1, (window or 0) + 1)
            output, _ = SegmentAttention()(
                Layer(), q, k, v, mark, segments=layout.plan, scaling=0.3
            )
        else:
            scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
            scores = scores.masked_fill(~allowed[:, None], float("-inf"))
            shares = torch.where(real[:, None, :, None], scores.softmax(-1), 0.0)
            output = (shares @ v.repeat_interleave(2, 1)).transpose(1, 2)
        (output * upstream).sum().backward()
        results.append([output[real], *(leaf.grad for leaf in leaves)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected.nan_to_num(0), atol=1e-10, rtol=0)


def segment_arrays(rows: list[Lengths]) -> tuple[Any, Any, Any]:
    """Positions, segments and parents of rows of trees, padded on the right."""
    found = []
    for row in rows:
        positions, segments, parents, number = [], [], [], 0
        for prompt, completions in row:
            parts = [(0, prompt, -1), *((prompt, size, number) for size in completions)]
            for offset, (start, size, parent) in enumerate(parts):
                positions += range(start, start + size)
                segments += [number + offset] * size
                parents += [parent] * size
            number += len(parts)
        found.append((positions, segments, parents))
    width = max(len(positions) for positions, _, _ in found) + 2
    arrays = []
    for index, fill in ((0, 0), (1, -1), (2, -1)):
        padded = [[*row[index], *[fill] * (width - len(row[index]))] for row in found]
        arrays.append(np.array(padded, np.int32))
    return arrays[0], arrays[1], arrays[2]


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 2.0,
            "sliding_window": 6,
        },
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_pack_and_make_their_own_logits(kind: str, tmp_path: Path) -> None:
    """Scales, caps and windows: loading compares with the model's own logits, or refuses it."""
    import transformers

    name, options = OTHERS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    config = getattr(transformers, name)(**sizes, **heads, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    from tests.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(
        ModelSection(path=str(tmp_path)), seed=0, dtype=torch.float32, temperature=1.0
    )
    # Gemma 2 caps its attention's logits, which only transformers' own attention does.
    assert policy.layout == ("shared" if kind == "gemma2" else "packed")
    assert expected_layout(policy.model.config.get_text_config()) == policy.layout


def test_a_layer_that_wants_more_than_is_known_falls_back_and_says_so(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    from raygrpo.models import load_model

    model = load_model(ModelSection(path=str(models["llama"])), seed=0, dtype=torch.float32)
    for layer in model.base_model.layers:
        layer.self_attn.register_forward_pre_hook(_with_sinks, with_kwargs=True)
    assert find_layout(model) == "shared"
    assert "do not attend by segment: attention with s_aux is not known" in caplog.text


def _with_sinks(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "s_aux": torch.zeros(1)}


@pytest.mark.parametrize("recompute", [False, True])
def test_segments_reach_the_layers_when_activations_are_recomputed(
    recompute: bool, models: dict[str, Path]
) -> None:
    made = make_groups([(9, [7, 3, 12]), (4, [5, 9])], 3)
    found = []
    for layout, options in (("plain", {}), ("packed", {"gradient_checkpointing": recompute})):
        learner = Recorder(models["gemma3"], layout, learner=options)  # type: ignore[arg-type]
        learner.update([microbatches(*made, layout, 100)])  # type: ignore[arg-type]
        found.append(learner.gradients[0])
    assert relative(found[1], found[0]) < RELATIVE
