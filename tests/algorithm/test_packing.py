from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.algorithm.packing import (
    RowLayout,
    attention_pairs,
    make_microbatch,
    place,
    row_length,
    trees_of,
)
from raygrpo.algorithm.step_plan import make_step_batch
from raygrpo.types import FinishedGroup, Group, PlannedSample, StepBatch
from tests import builders
from tests.builders import completion, finished, group, request, summary

LAYOUTS: tuple[RowLayout, ...] = ("plain", "shared", "packed")
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
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([10.0, 400.0, 1e9]),
)
def test_every_sample_has_one_place_and_ranks_agree(
    groups: list[tuple[int, list[int]]], ranks: int, budget: int, layout: RowLayout, scale: float
) -> None:
    batch = plan_of(groups)
    options: dict[str, Any] = {"layout": layout, "hidden_size": scale / 6}
    placed = place(batch, ranks, tokens_per_microbatch=budget, **options)
    assert len(placed) == ranks
    for index, minibatch in enumerate(batch.minibatches):
        counts = {len(rank[index]) for rank in placed}
        assert len(counts) == 1, "every rank runs as many microbatches"
        microbatches = [microbatch for rank in placed for microbatch in rank[index]]
        rows = [row for microbatch in microbatches for row in microbatch]
        found = Counter(
            (s.group_id, s.completion_index) for row in rows for s in row if not s.filler
        )
        assert found == Counter((s.group_id, s.completion_index) for s in minibatch)
        for microbatch in microbatches:
            lengths = [row_length(row) for row in microbatch]
            lone = len(microbatch) == 1 and len(trees_of(microbatch[0])) == 1
            assert lone or max(lengths) * len(lengths) <= budget
            assert layout != "packed" or len(microbatch) == 1
        for row in rows:
            assert layout == "packed" or len({s.group_id for s in row}) == 1
            assert layout != "plain" or len(row) == 1
            assert len(trees_of(row)) == len({s.group_id for s in row}), "a prompt once a row"
    assert place(batch, ranks, tokens_per_microbatch=budget, **options) == placed


def test_a_fuller_rank_is_split_where_there_is_one_group_too_few() -> None:
    """Three groups on four ranks: no rank idles, and a group's prompt is computed twice."""
    placed = place(plan_of([(4, [50] * 8)] * 3), 4, tokens_per_microbatch=1000, layout="packed")
    loads = [sum(row_length(row) for m in rank[0] for row in m) for rank in placed]
    assert max(loads) < 1.2 * sum(loads) / 4 and not any(
        s.filler for rank in placed for m in rank[0] for row in m for s in row
    )


def test_microbatches_are_filled_with_the_long_first() -> None:
    groups = [(2, [58]), (2, [38]), (2, [38]), (2, [18]), (2, [18])]
    ((microbatches,),) = place(plan_of(groups), 1, tokens_per_microbatch=80, layout="packed")
    assert [[s.group_id for s in row] for (row,) in microbatches] == [[0, 3], [1, 2], [4]]


def test_sharing_is_chosen_where_it_saves_work() -> None:
    long_prompt = place(plan_of([(100, [5] * 8)]), 1, tokens_per_microbatch=4096)
    assert [len(row) for row in long_prompt[0][0][0]] == [8]
    # By segment, a long row pays for no more attention than separate rows do.
    by_segment = plan_of([(2, [500] * 8)])
    packed = place(by_segment, 1, tokens_per_microbatch=10**6, hidden_size=50, layout="packed")
    assert [len(row) for row in packed[0][0][0]] == [8]
    # Completions attend to nothing of each other, so a long row of long completions pays for
    # attention that separate rows do not.
    short_prompt = place(plan_of([(2, [500] * 8)]), 1, tokens_per_microbatch=10**6, hidden_size=50)
    assert {len(row) for m in short_prompt[0][0] for row in m} == {1}


def test_attention_pairs_by_hand() -> None:
    """A prompt of 3 sees 1 + 2 + 3 tokens; a completion of 2 sees it twice, and itself 1 + 2."""
    ((tree,),) = place(plan_of([(3, [2, 1])]), 1, tokens_per_microbatch=99)[0][0]
    assert attention_pairs(tree) == 6 + (2 * 3 + 3) + (3 + 1)


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


def test_arrays_of_a_packed_row() -> None:
    """A tree after another sample: columns and segments go on, positions begin anew."""
    payloads = {
        0: group(request(0, num_completions=2, tokens=(5, 6)), [completion([10])] * 2),
        1: group(
            request(1, num_completions=2, tokens=(7, 8)), [completion([20]), completion([21, 22])]
        ),
    }
    samples = plan_of([(2, [1, 1]), (2, [1, 2])]).minibatches[0]
    packed = make_microbatch(((samples[0], *samples[2:]),), payloads)
    assert packed.token_ids.tolist() == [[5, 6, 10, 7, 8, 20, 21, 22]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 2, 2, 3]]
    assert packed.segment_ids.tolist() == [[0, 0, 0, 2, 2, 3, 4, 4]]
    assert packed.parent_ids.tolist() == [[-1, -1, -1, -1, -1, 2, 2, 2]]
    assert packed.predictors.tolist() == [[0, 0, 1, 2, 3, 4, 4, 6]]
    assert packed.sequence_ids.tolist() == [[-1, -1, 0, -1, -1, 1, 2, 2]]


def test_fillers_weigh_nothing() -> None:
    order = request(0, num_completions=2)
    payload: Group = group(order, [completion([10]), completion([11])])
    placed = place(plan_of([(3, [1, 1])]), 4, tokens_per_microbatch=64)
    fillers = [m for rank in placed for m in rank[0] if m[0][0].filler]
    assert fillers
    arrays = make_microbatch(fillers[0], {0: payload})
    assert not arrays.loss_mask.any()
    assert not arrays.loss_weights.any()


def test_plan_excludes_what_has_no_score_and_counts_what_is_filtered() -> None:
    settings_ = builders.config(
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
        teaches=True,
    )
    batch = make_step_batch(0, [done], settings_)
    (samples,) = batch.minibatches
    assert [s.completion_index for s in samples] == [0, 1]
    # Three sequences count: two computed, one filtered; the unscored one is in no denominator.
    assert [s.loss_weight for s in samples] == pytest.approx([1 / 6, 1 / 12])
    unfiltered = builders.config(loss={"aggregation": "sequence"}, sampling={"num_completions": 4})
    (samples_all,) = make_step_batch(0, [done], unfiltered).minibatches  # type: ignore[arg-type]
    assert [s.completion_index for s in samples_all] == [0, 1, 3]
    # The filtered one is in the baseline: (1 + 0 + 1) / 3.
    assert [s.advantage for s in samples] == pytest.approx([1 / 3, -2 / 3])


@pytest.mark.parametrize(
    ("aggregation", "weight"),
    [("token", 1 / 16), ("sequence", 1 / 16), ("constant", 1 / 40), ("prompt", 1 / 16)],
)
def test_a_kept_group_without_signal_counts_in_every_denominator(
    aggregation: str, weight: float
) -> None:
    """Two groups of two completions of 4 tokens, at most 10."""
    settings_ = builders.config(
        loss={"aggregation": aggregation}, sampling={"num_completions": 2, "max_tokens": 10}
    )
    groups = [finished(0, [1.0, 0.0]), finished(1, [1.0, 1.0])]
    (samples,) = make_step_batch(0, groups, settings_).minibatches  # type: ignore[arg-type]
    assert [s.advantage for s in samples[2:]] == [0, 0]
    assert [s.loss_weight for s in samples] == pytest.approx([weight] * 4)


def test_minibatches_have_denominators_of_their_own() -> None:
    settings_ = builders.config(train={"groups_per_step": 2, "num_minibatches": 2})
    batch = make_step_batch(0, [finished(0, [1.0, 0.0]), finished(1, [1.0, 1.0])], settings_)
    assert [len(m) for m in batch.minibatches] == [2, 2]
    assert {s.loss_weight for m in batch.minibatches for s in m} == {np.float32(1 / 8)}
    assert batch.has_signal
    flat = make_step_batch(0, [finished(0, [1.0, 1.0]), finished(1, [0.0, 0.0])], settings_)
    assert not flat.has_signal
