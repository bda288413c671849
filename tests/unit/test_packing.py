from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.algorithm.packing import make_microbatch, place
from raygrpo.algorithm.plan import make_step_batch
from raygrpo.algorithm.window import FinishedGroup
from raygrpo.config_file import load_config
from raygrpo.types import Group, PlannedSample, StepBatch
from tests.builders import completion, finished, group, request, summary

LENGTHS = st.lists(st.integers(1, 30), min_size=2, max_size=6)


def plan_of(groups: list[tuple[int, list[int]]], minibatches: int = 1) -> StepBatch:
    """A step of groups (prompt length, completion lengths)."""
    samples = [
        tuple(
            PlannedSample(
                group_id=group_id,
                completion_index=index,
                prompt_length=prompt_length,
                completion_length=length,
                num_loss_tokens=length,
                advantage=0.5,
                loss_weight=0.1,
            )
            for index, length in enumerate(lengths)
        )
        for group_id, (prompt_length, lengths) in enumerate(groups)
    ]
    size = max(1, len(samples) // minibatches)
    chunks = [sum(samples[i : i + size], ()) for i in range(0, len(samples), size)]
    return StepBatch(
        step=0,
        minibatches=tuple(chunks),
        payloads=dict.fromkeys(range(len(groups)), "ref"),
        versions={},
    )


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 40), LENGTHS), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    budget=st.integers(1, 300),
    shared=st.booleans(),
    scale=st.sampled_from([10.0, 400.0, 1e9]),
)
def test_every_sample_has_one_place_and_ranks_agree(
    groups: list[tuple[int, list[int]]], ranks: int, budget: int, shared: bool, scale: float
) -> None:
    batch = plan_of(groups)
    placed = place(
        batch,
        ranks,
        tokens_per_microbatch=budget,
        shared_prompts=shared,
        attention_length=scale,
    )
    assert len(placed) == ranks
    for index, minibatch in enumerate(batch.minibatches):
        counts = {len(rank[index]) for rank in placed}
        assert len(counts) == 1, "every rank runs as many microbatches"
        found = Counter(
            (s.group_id, s.completion_index)
            for rank in placed
            for microbatch in rank[index]
            for row in microbatch
            for s in row
            if not s.filler
        )
        assert found == Counter((s.group_id, s.completion_index) for s in minibatch)
        for rank in placed:
            for microbatch in rank[index]:
                rows = [
                    r[0].prompt_length + sum(s.completion_length for s in r) for r in microbatch
                ]
                assert len(rows) == 1 or max(rows) * len(rows) <= budget
                for row in microbatch:
                    assert len({s.group_id for s in row}) == 1
                    assert shared or len(row) == 1
    again = place(
        batch, ranks, tokens_per_microbatch=budget, shared_prompts=shared, attention_length=scale
    )
    assert again == placed


def test_sharing_is_chosen_where_it_saves_work() -> None:
    long_prompt = place(plan_of([(100, [5] * 8)]), 1, tokens_per_microbatch=4096)
    assert [len(row) for row in long_prompt[0][0][0]] == [8]
    # Completions attend to nothing of each other, so a long row of long completions pays for
    # attention that separate rows do not.
    short_prompt = place(
        plan_of([(2, [500] * 8)]), 1, tokens_per_microbatch=10**6, attention_length=300.0
    )
    assert {len(row) for m in short_prompt[0][0] for row in m} == {1}


def test_arrays_of_plain_and_shared_rows() -> None:
    order = request(0, num_completions=2, tokens=(5, 6, 7))
    payload = group(
        order,
        [
            completion([10, 11], [-0.1, -0.2]),
            completion([20, 21, 22], [-0.3, -0.4, -0.5], [True, False, True]),
        ],
    )
    batch = plan_of([(3, [2, 3])])
    samples = batch.minibatches[0]
    shared = make_microbatch((samples,), {0: payload})
    assert shared.token_ids.tolist() == [[5, 6, 7, 10, 11, 20, 21, 22]]
    assert shared.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert shared.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert shared.parent_ids.tolist() == [[-1, -1, -1, 0, 0, 0, 0, 0]]
    assert shared.predictors.tolist() == [[0, 0, 1, 2, 3, 2, 5, 6]]
    assert shared.loss_mask.tolist() == [[False] * 3 + [True, True, True, False, True]]
    assert shared.sequence_ids.tolist() == [[-1, -1, -1, 0, 0, 1, 1, 1]]
    assert shared.sampler_logprobs[0].tolist() == pytest.approx(
        [0, 0, 0, -0.1, -0.2, -0.3, -0.4, -0.5]
    )
    plain = make_microbatch(tuple((s,) for s in samples), {0: payload})
    assert plain.token_ids.tolist() == [[5, 6, 7, 10, 11, 0], [5, 6, 7, 20, 21, 22]]
    assert plain.segment_ids.tolist() == [[0, 0, 0, 0, 0, -1], [0] * 6]
    assert plain.predictors.tolist() == [[0, 0, 1, 2, 3, 0], [0, 0, 1, 2, 3, 4]]
    assert plain.sequence_ids.tolist() == [[-1] * 3 + [0, 0, -1], [-1] * 3 + [1] * 3]
    assert plain.advantages.tolist() == [0.5, 0.5]


def test_fillers_weigh_nothing() -> None:
    order = request(0, num_completions=2)
    payload: Group = group(order, [completion([10]), completion([11])])
    placed = place(plan_of([(3, [1, 1])]), 4, tokens_per_microbatch=64)
    fillers = [m for rank in placed for m in rank[0] if m[0][0].filler]
    assert fillers
    arrays = make_microbatch(fillers[0], {0: payload})
    assert not arrays.loss_mask.any()
    assert not arrays.loss_weights.any()


def config(**sections: object) -> object:
    base = {"model": {"path": "m"}, "data": {"source": "d"}}
    return load_config({**base, **sections})


def test_plan_excludes_what_has_no_score_and_counts_what_is_filtered() -> None:
    settings_ = config(
        advantage={"mask_truncated": True},
        loss={"aggregation": "sequence"},
        sampling={"num_completions": 4},
    )
    done = FinishedGroup(
        summary=summary(
            3,
            [1.0, 0.0, None, 1.0],
            lengths=[2, 4, 5, 8],
            finishes=["stop", "stop", "stop", "length"],
        ),
        payload="ref",
    )
    batch = make_step_batch(0, [done], settings_)  # type: ignore[arg-type]
    (samples,) = batch.minibatches
    assert [s.completion_index for s in samples] == [0, 1]
    # Three sequences count: two computed, one filtered; the unscored one is in no denominator.
    assert [s.loss_weight for s in samples] == pytest.approx([1 / 6, 1 / 12])
    unfiltered = config(loss={"aggregation": "sequence"}, sampling={"num_completions": 4})
    (samples_all,) = make_step_batch(0, [done], unfiltered).minibatches  # type: ignore[arg-type]
    assert [s.completion_index for s in samples_all] == [0, 1, 3]
    # The filtered one is in the baseline: (1 + 0 + 1) / 3.
    assert [s.advantage for s in samples] == pytest.approx([1 / 3, -2 / 3])


def test_minibatches_have_denominators_of_their_own() -> None:
    settings_ = config(train={"groups_per_step": 2, "num_minibatches": 2})
    batch = make_step_batch(0, [finished(0, [1.0, 0.0]), finished(1, [1.0, 1.0])], settings_)  # type: ignore[arg-type]
    assert [len(m) for m in batch.minibatches] == [2, 2]
    assert {s.loss_weight for m in batch.minibatches for s in m} == {np.float32(1 / 8)}
    assert batch.has_signal
    flat = make_step_batch(0, [finished(0, [1.0, 1.0]), finished(1, [0.0, 0.0])], settings_)  # type: ignore[arg-type]
    assert not flat.has_signal
