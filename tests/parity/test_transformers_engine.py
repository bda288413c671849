"""The embedded engine against transformers itself, on tiny random models in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raygrpo.config import ModelSection
from raygrpo.engines.base import Engine
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.errors import DataError, InfraError, NumericError
from raygrpo.models import load_model
from raygrpo.types import ByteArray, Group, GroupRequest, Stream, Version
from raygrpo.weights.buckets import make_version
from raygrpo.weights.types import WeightsManifest
from tests import builders
from tests.parity.conftest import KINDS
from tests.tiny import Kind, forced, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("sharing")
FIRST = Version(0, 0)
# Cached decoding and one full forward pass add float32 numbers in different orders.
TOLERANCE = 1e-4
Published = tuple[WeightsManifest, list[ByteArray]]


def section(path: Path) -> ModelSection:
    return ModelSection(path=str(path))


def plain_model(path: Path) -> Any:
    return load_model(section(path), seed=0, dtype=torch.float32)


def publish(model: Any, version: Version = FIRST, skip: Sequence[str] = ()) -> Published:
    """Buckets of a few tensors each, as a learner publishes them."""
    named = ((name, p) for name, p in model.named_parameters() if name not in skip)
    manifest, buckets = make_version(version, named, 8192)
    assert len(buckets) > 2
    return manifest, buckets


def make_engine(
    path: Path, *, max_rows: int = 10, deterministic: bool = False, load: bool = True
) -> TransformersEngine:
    made = TransformersEngine(section(path), seed=0, max_rows=max_rows, deterministic=deterministic)
    if load:
        made.load_weights(*publish(plain_model(path)))
    return made


def request(
    group_id: int,
    *,
    length: int = 6,
    stream: Stream = "train",
    attempt: int = 0,
    min_version: Version = FIRST,
    **sampling: Any,
) -> GroupRequest:
    rng = np.random.default_rng(group_id + 100)
    ids = rng.integers(3, 80, length).tolist()
    settings: dict[str, Any] = {"num_completions": 3, "max_tokens": 12, **sampling}
    order = builders.request(group_id, tokens=ids, **settings)
    return replace(order, stream=stream, attempt=attempt, seed=5, min_version=min_version)


def finish(engine: Engine) -> dict[tuple[Stream, int], Group]:
    return {(group.request.stream, group.request.group_id): group for group in drain(engine)}


def drain(engine: Engine) -> Iterator[Group]:
    while engine.num_unfinished:
        assert engine.can_step
        yield from engine.step()


def run(engine: Engine, *requests: GroupRequest) -> dict[tuple[Stream, int], Group]:
    for item in requests:
        engine.submit(item)
    return finish(engine)


def assert_logprobs_match(model: Any, group: Group, engine: Engine | None = None) -> None:
    for completion in group.completions:
        expected = forced(model, group.request, completion).numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)
        if engine is not None:
            whole = np.concatenate([group.request.prompt.token_ids, completion.token_ids])
            scored = engine.score(whole.tolist(), group.request.sampling.temperature)
            assert scored.shape == whole.shape
            assert scored[0] == 0
            np.testing.assert_allclose(scored[-len(expected) :], expected, atol=TOLERANCE, rtol=0)


def tokens_of(group: Group) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in group.completions]


def bits_of(group: Group) -> list[tuple[bytes, bytes]]:
    return [(c.token_ids.tobytes(), c.logprobs.tobytes()) for c in group.completions]


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_teacher_forcing_while_groups_join_and_leave(
    paths: Callable[..., Path], kind: Kind
) -> None:
    engine = make_engine(paths(kind), max_rows=10)
    rng = np.random.default_rng(0)
    requests = [
        request(
            number,
            length=int(rng.integers(1, 30)),
            max_tokens=int(rng.integers(1, 40)),
            num_completions=int(rng.integers(1, 6)),
            temperature=(1.0, 0.8, 1.3)[number % 3],
        )
        for number in range(14)
    ]
    groups = run(engine, *requests)
    assert sorted(groups) == [("train", number) for number in range(14)]
    model = plain_model(paths(kind))
    for group in groups.values():
        assert_logprobs_match(model, group, engine)
        for completion in group.completions:
            assert completion.loss_mask.all()
            assert completion.version_runs == ((FIRST, completion.token_ids.size),)
            if completion.finish == "length":
                assert completion.token_ids.size == group.request.sampling.max_tokens
            else:
                assert completion.token_ids[-1] == 1
        assert group.generate_s > 0
    finishes = {c.finish for group in groups.values() for c in group.completions}
    assert finishes == {"stop", "length"}, "the test should see both kinds of end"


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(paths: Callable[..., Path], kind: Kind) -> None:
    engine = make_engine(paths(kind))
    requests = [
        request(
            number,
            length=3 + 5 * number,
            max_tokens=30,
            num_completions=1,
            temperature=0,
            repetition_penalty=1.0 + 0.4 * (number % 2),
            min_tokens=4 * (number % 3),
        )
        for number in range(6)
    ]
    groups = run(engine, *requests)
    model = plain_model(paths(kind))
    for item in requests:
        ids = torch.from_numpy(item.prompt.token_ids.astype(np.int64))[None]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=30,
            min_new_tokens=item.sampling.min_tokens or None,
            repetition_penalty=item.sampling.repetition_penalty,
        )
        group = groups["train", item.group_id]
        assert tokens_of(group) == [expected[0, ids.shape[1] :].tolist()]
        assert not group.completions[0].logprobs.any()


def test_long_prompts_are_computed_in_chunks(
    paths: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygrpo.engines.hf.forward.PREFILL_CHUNK", 7)
    for kind in KINDS:
        engine = make_engine(paths(kind))
        for group in run(engine, request(0, length=38), request(1, length=14)).values():
            assert_logprobs_match(plain_model(paths(kind)), group)


def test_cache_grows_with_long_completions(
    paths: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygrpo.engines.hf.engine.FIRST_ROOM", 1)
    monkeypatch.setattr("raygrpo.engines.hf.cache.GROWTH", 4)
    engine = make_engine(paths("gemma3"))
    requests = [request(n, length=2 + n, max_tokens=60) for n in range(5)]
    groups = run(engine, *requests)
    for group in groups.values():
        assert_logprobs_match(plain_model(paths("gemma3")), group)
    assert max(c.token_ids.size for g in groups.values() for c in g.completions) == 60


def test_tokens_do_not_depend_on_the_batch(paths: Callable[..., Path]) -> None:
    """Not bit for bit, but no token of these is decided by rounding."""
    requests = [request(n, length=4 + 3 * n, max_tokens=20) for n in range(6)]
    together = run(make_engine(paths(), max_rows=18), *requests)
    crowded = run(make_engine(paths(), max_rows=6), *reversed(requests))
    engine = make_engine(paths())
    for item in requests:
        key: tuple[Stream, int] = ("train", item.group_id)
        alone = tokens_of(run(engine, item)[key])
        assert alone == tokens_of(together[key]) == tokens_of(crowded[key])


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_mode_gives_the_same_bits(paths: Callable[..., Path], kind: Kind) -> None:
    wanted = request(3, length=11, num_completions=5, max_tokens=40)
    again = request(3, length=11, num_completions=5, max_tokens=40, attempt=4)
    others = [request(n, length=40 - n, num_completions=7, max_tokens=50) for n in (1, 2)]
    alone = run(make_engine(paths(kind), deterministic=True), wanted)["train", 3]
    engine = make_engine(paths(kind), max_rows=64, deterministic=True)
    after = run(engine, *others, again)["train", 3]
    assert bits_of(after) == bits_of(alone)
    engine.load_weights(*publish(plain_model(paths(kind, 1)), Version(0, 1)))
    assert bits_of(run(engine, again)["train", 3]) != bits_of(alone)
    engine.load_weights(*publish(plain_model(paths(kind)), Version(0, 2)))
    assert bits_of(run(engine, others[1], again)["train", 3]) == bits_of(alone)


def test_equal_ids_of_two_streams_are_two_groups(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths())
    groups = run(engine, request(0), request(0, stream="eval"))
    assert tokens_of(groups["train", 0]) != tokens_of(groups["eval", 0])


def test_a_group_larger_than_max_rows_runs_alone(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths(), max_rows=4)
    items = [request(0), request(1, num_completions=9), request(2)]
    groups = run(engine, *items)
    assert len(groups["train", 1].completions) == 9
    for group in groups.values():
        assert_logprobs_match(plain_model(paths()), group)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_stop_strings_end_a_completion_at_once(paths: Callable[..., Path], length: int) -> None:
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {"num_completions": 60, "max_tokens": 60, "temperature": 0.4}
    engine = make_engine(paths(), max_rows=60)
    free = run(engine, request(0, **settings))["train", 0]
    pieces = Counter(
        completion.text[place : place + length]
        for completion in free.completions
        for place in range(5, len(completion.text) - length)
    )
    stop = pieces.most_common(1)[0][0]
    held = run(engine, request(0, **settings, stop=(stop, "~")))["train", 0]
    ended = 0
    for before, after in zip(free.completions, held.completions, strict=True):
        lengths = range(1, before.token_ids.size + 1)
        texts = [tokenizer.decode(before.token_ids[:n], skip_special_tokens=True) for n in lengths]
        expected = next((n for n, text in enumerate(texts, 1) if stop in text), None)
        assert after.token_ids.size == (expected or before.token_ids.size)
        assert after.token_ids.tolist() == before.token_ids[: after.token_ids.size].tolist()
        assert after.loss_mask.all()
        if expected:
            ended += 1
            assert after.finish == "stop"
            assert after.text.endswith(stop)
    assert ended >= 3, "the test should see the stop string often"


def test_stop_strings_wait_for_min_tokens(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths(), max_rows=60)
    settings: dict[str, Any] = {
        "num_completions": 40,
        "max_tokens": 60,
        "min_tokens": 25,
        "temperature": 0.7,
    }
    group = run(engine, request(0, **settings, stop=("a",)))["train", 0]
    sizes = [completion.token_ids.size for completion in group.completions]
    assert min(sizes) == 25
    assert sizes.count(25) > 1
    assert len(set(sizes)) > 2
    for completion in group.completions:
        assert (completion.finish == "stop") == (completion.text.find("a") >= 0) or (
            completion.token_ids[-1] == 1
        )


def test_min_tokens_forbids_stop_ids(paths: Callable[..., Path]) -> None:
    model = plain_model(paths())
    item = request(2, num_completions=40, max_tokens=30, min_tokens=20)
    group = run(make_engine(paths()), item)["train", 2]
    assert_logprobs_match(model, group)
    assert all(c.token_ids.size >= 20 for c in group.completions)
    assert any(c.finish == "stop" for c in group.completions)


def test_groups_with_other_settings_share_a_batch(paths: Callable[..., Path]) -> None:
    """Each keeps its own distribution: logprobs and support, where the others' would show."""
    model = plain_model(paths())
    items = [
        request(0, num_completions=4),
        request(1, num_completions=4, top_k=3, temperature=0.9),
        request(2, num_completions=4, repetition_penalty=1.5),
        request(4, num_completions=4, repetition_penalty=1.5, length=40),
        request(3, num_completions=1, temperature=0, stream="eval"),
    ]
    groups = run(make_engine(paths(), max_rows=20), *items)
    for number in (0, 1, 2, 4):
        assert_logprobs_match(model, groups["train", number])
    assert not groups["eval", 3].completions[0].logprobs.any()


def test_weights_change_between_steps(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths())
    settings: dict[str, Any] = {"max_tokens": 12, "min_tokens": 12}
    engine.submit(request(0, **settings))
    for _ in range(5):
        assert engine.step() == []
    newer = plain_model(paths("llama", 1))
    engine.load_weights(*publish(newer, Version(0, 1)))
    assert engine.version == Version(0, 1)
    groups = run(engine, request(1, **settings))
    for completion in groups["train", 0].completions:
        assert completion.version_runs == ((FIRST, 5), (Version(0, 1), 7))
        assert (completion.oldest, completion.newest) == (FIRST, Version(0, 1))
    for completion in groups["train", 1].completions:
        assert completion.version_runs == ((Version(0, 1), 12),)
    fresh = run(engine, request(2))["train", 2]
    assert_logprobs_match(newer, fresh, engine)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_changes_every_tensor(paths: Callable[..., Path], kind: Kind) -> None:
    engine = make_engine(paths(kind))
    newer = plain_model(paths(kind, 1))
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    engine.load_weights(*publish(newer, Version(0, 1)))
    assert_logprobs_match(newer, run(engine, request(0))["train", 0], engine)


def test_a_corrupt_bucket_changes_nothing(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths())
    expected = run(engine, request(0))["train", 0]
    manifest, buckets = publish(plain_model(paths("llama", 1)), Version(0, 1))
    damaged = [bucket.copy() for bucket in buckets]
    damaged[-1][7] ^= 1
    engine.submit(request(0))
    with pytest.raises(InfraError, match="is corrupt"):
        engine.load_weights(manifest, damaged)
    with pytest.raises(InfraError, match="no version is staged"):
        engine.commit_weights()
    assert engine.version == FIRST
    assert bits_of(finish(engine)["train", 0]) == bits_of(expected)
    engine.load_weights(manifest, buckets)
    engine.submit(request(1))
    assert_logprobs_match(plain_model(paths("llama", 1)), finish(engine)["train", 1], engine)


def test_unfit_versions_are_refused_and_the_held_one_stays(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths())
    engine.load_weights(*publish(plain_model(paths()), Version(1, 3)))
    model = plain_model(paths())
    with pytest.raises(InfraError, match="older than"):
        engine.load_weights(*publish(model, Version(0, 9)))
    with pytest.raises(InfraError, match=r"lacks 1 of .*model\.norm\.weight"):
        engine.load_weights(*publish(model, Version(1, 4), skip=["model.norm.weight"]))
    with pytest.raises(InfraError, match="published as bfloat16"):
        engine.load_weights(*publish(plain_model(paths()).bfloat16(), Version(1, 4)))
    model.model.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(InfraError, match=r"no tensor model\.extra"):
        engine.load_weights(*publish(model, Version(1, 4)))
    assert engine.version == Version(1, 3)
    manifest, buckets = publish(plain_model(paths()), Version(1, 4))
    with pytest.raises(InfraError, match="buckets came"):
        engine.load_weights(manifest, buckets[:-1])
    with pytest.raises(InfraError, match="more than"):
        engine.load_weights(manifest, [*buckets, buckets[0]])
    assert engine.version == Version(1, 3)


def test_abort_returns_what_was_written(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths(), max_rows=6)
    whole = run(engine, request(0, min_tokens=12), request(1, min_tokens=12))
    for number in range(3):
        engine.submit(request(number, min_tokens=12))
    for _ in range(4):
        engine.step()
    partials = engine.abort("train", 0)
    assert [c.token_ids.tolist() for c in partials] == [
        tokens[:4] for tokens in tokens_of(whole["train", 0])
    ]
    assert {c.finish for c in partials} == {"abort"}
    assert engine.abort("train", 2) == []
    assert engine.abort("eval", 1) == []
    assert engine.num_unfinished == 1
    assert tokens_of(finish(engine)["train", 1]) == tokens_of(whole["train", 1])


def test_a_request_that_cannot_fit_is_refused(paths: Callable[..., Path]) -> None:
    engine = make_engine(paths())
    with pytest.raises(DataError, match=r"group train/7: a prompt of 500 tokens and max_tokens 13"):
        engine.submit(request(7, length=500, max_tokens=13))
    bad = request(9)
    bad.prompt.token_ids[2] = 5000
    with pytest.raises(DataError, match="ids outside"):
        engine.submit(bad)


def test_logits_that_are_not_finite_name_the_group(paths: Callable[..., Path]) -> None:
    """The embedding of one token is poisoned: only the group whose prompt has it fails.

    A third group is moved to the second one's rows, and a fourth takes up what else that one had,
    each with a shorter prompt: what the second one left would lie among the keys that masks hide.
    """
    engine = make_engine(paths("llama"), max_rows=9)
    model = plain_model(paths("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[87] = torch.nan
    engine.load_weights(*publish(model, Version(0, 1)))
    poisoned = request(5, length=20)
    poisoned.prompt.token_ids[3] = 87
    engine.submit(request(4, length=20))
    engine.submit(poisoned)
    engine.submit(request(6, length=2))
    with pytest.raises(NumericError, match="group train/5"):
        engine.step()
    engine.submit(request(7, length=5))
    groups = finish(engine)
    assert sorted(groups) == [("train", 4), ("train", 6), ("train", 7)]
    for group in groups.values():
        assert_logprobs_match(plain_model(paths("llama")), group)


def test_an_fp32_head_follows_the_weights(paths: Callable[..., Path]) -> None:
    """Scores against a float32 product written out here, before and after a new version; decoding
    goes by the same logits."""
    wide = ModelSection(path=str(paths()), dtype="bfloat16", fp32_head=True)
    ids = [int(token) for token in np.random.default_rng(1).integers(3, 80, 20)]
    found = []
    for head in (wide, wide.model_copy(update={"fp32_head": False})):
        engine = TransformersEngine(head, seed=0, max_rows=4, deterministic=False)
        gaps = []
        for seed in (0, 1):
            model = load_model(section(paths(seed=seed)), seed=0, dtype=torch.bfloat16)
            engine.load_weights(*publish(model, Version(0, seed)))
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0].float()
                table = torch.log_softmax(hidden @ model.lm_head.weight.float().T, -1)
            expected = table[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0].numpy()
            gaps.append(float(np.abs(engine.score(ids)[1:] - expected).max()))
            engine.submit(request(seed, min_version=Version(0, seed)))
            (group,) = drain(engine)
            assert all(np.isfinite(c.logprobs).all() for c in group.completions)
        found.append(gaps)
    # Two orders of float32 sums, against logits of 8 bits.
    assert max(found[0]) < 1e-5
    assert min(found[1]) > 1e-3
