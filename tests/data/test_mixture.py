"""Mixtures: shares, order, names, resuming."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.config import DataSection
from raygrpo.config.file import load_config
from raygrpo.data.loading import make_prompts
from raygrpo.data.mixture import Mixture, Part, mixture_parts
from raygrpo.data.prompts import PromptStream
from raygrpo.errors import ConfigError, DataError
from raygrpo.tracking.metrics import source_metrics
from tests import builders
from tests.data.data_cases import section, source_of
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    for name, size in (("adds", 7), ("muls", 7), ("words", 31)):
        rows = [{"prompt": f"{name} {i}=", "answer": str(i)} for i in range(size)]
        datasets.Dataset.from_list(rows).to_json(directory / f"{name}.jsonl")
    return directory


def mixed(files: Path, **keys: Any) -> DataSection:
    """Three parts, one of them streamed."""
    parts = [
        {"source": str(files / "muls.jsonl"), "weight": 2, "template": "? {prompt}"},
        {
            "source": str(files / "words.jsonl"),
            "name": "text",
            "params": {"streaming": True},
            "max_pass_rate": None,
        },
    ]
    return section(str(files / "adds.jsonl"), mixture=parts, **keys)


def ids(prompts: PromptStream, count: int) -> list[str]:
    return [prompts.next().id for _ in range(count)]


WEIGHTS = st.lists(st.floats(0.05, 10), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 1000))
def test_every_prefix_has_the_weights_shares(weights: list[float], seed: int) -> None:
    """Within 3 + ln n draws: the discrepancy of the golden ratio's multiples is O(log n).

    Independent draws would be off by about sqrt(n w (1 - w)), 11 at the end.
    """
    part = source_of([{"prompt": "a"}])
    names = [f"part{i}" for i in range(len(weights))]
    mixture = Mixture(dict.fromkeys(names, part), weights, seed=seed)
    counts = Counter[str]()
    for n in range(1, 501):
        counts[mixture.next().source] += 1
        for name, weight in zip(names, weights, strict=True):
            assert abs(counts[name] - n * weight / sum(weights)) <= 3 + math.log(n)


def test_a_single_draw_has_the_weights_probabilities() -> None:
    """Over seeds, each draw by itself: 3 of 4 for the second part, four standard errors."""
    part = source_of([{"prompt": "a"}])
    for position in (0, 5):
        hits = 0
        for seed in range(400):
            mixture = Mixture({"a": part, "b": part}, [1.0, 3.0], seed=seed)
            hits += [mixture.next().source for _ in range(position + 1)][-1] == "b"
        assert abs(hits / 400 - 0.75) <= 4 * math.sqrt(0.75 * 0.25 / 400)


def test_parts_have_their_own_keys_names_and_epochs(files: Path) -> None:
    prompts = make_prompts(mixed(files), TOKENIZER, seed=0)
    drawn = [prompts.next() for _ in range(84)]
    counts = Counter(prompt.source for prompt in drawn)
    assert counts.keys() == {"adds", "muls", "text"}
    assert abs(counts["muls"] - 42) <= 3
    assert all(p.text.startswith("? muls") == (p.source == "muls") for p in drawn if p.text)
    assert all(prompt.id.startswith(f"{prompt.source}/row-") for prompt in drawn)
    first = {}
    for name in ("adds", "muls"):
        own = [prompt.id.partition("/")[2] for prompt in drawn if prompt.source == name]
        first[name] = own[:7]
        assert len(set(own[:7])) == 7, "an epoch of a part has each row once"
        assert own[:7] != own[7:14]
    assert first["adds"] != first["muls"], "parts of one size are not shuffled alike"
    assert prompts.metrics()["sources/muls/epoch"] == counts["muls"] / 7


@settings(max_examples=5, deadline=None)
@given(before=st.integers(0, 90), seed=st.integers(0, 3))
def test_a_restored_mixture_goes_on_where_it_was(files: Path, before: int, seed: int) -> None:
    whole = ids(make_prompts(mixed(files), TOKENIZER, seed=seed), before + 40)
    first = make_prompts(mixed(files), TOKENIZER, seed=seed)
    ids(first, before)
    second = make_prompts(mixed(files), TOKENIZER, seed=seed)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.epoch == first.epoch
    assert ids(second, 40) == whole[before:]
    assert ids(make_prompts(mixed(files), TOKENIZER, seed=9), 40) != whole[:40]


def test_another_mixture_is_refused_on_restore(files: Path) -> None:
    whole = mixed(files)
    state = make_prompts(whole, TOKENIZER, seed=0).state()
    fewer = whole.model_copy(update={"mixture": whole.mixture[:1]})
    alone = whole.model_copy(update={"mixture": []})
    state_alone = make_prompts(alone, TOKENIZER, seed=0).state()
    for changed, taken in ((fewer, state), (alone, state), (whole, state_alone)):
        with pytest.raises(DataError, match="changed since the checkpoint"):
            make_prompts(changed, TOKENIZER, seed=0).restore(taken)


def test_take_mixes_the_tops(files: Path) -> None:
    prompts = make_prompts(mixed(files), TOKENIZER, seed=0)
    taken = prompts.take(20)
    assert len({prompt.id for prompt in taken}) == 20
    for name in ("adds", "muls", "text"):
        own = [prompt.id for prompt in taken if prompt.source == name]
        assert own == [f"{name}/row-{i}" for i in range(len(own))]
    assert len(prompts.take(1000)) == 7 + 7 + 31
    assert prompts.epoch == 0


def parts(*entries: dict[str, Any], **keys: Any) -> Sequence[Part]:
    return mixture_parts(section("rows.jsonl", mixture=list(entries), **keys))


def test_a_part_takes_the_sections_keys_but_not_another_sources_params() -> None:
    base: dict[str, Any] = {"params": {"delimiter": ";"}, "chat": True, "max_prompt_length": 9}
    first, same, other = parts(
        {"name": "again", "params": {"streaming": True}},
        {"source": "openai/gsm8k", "params": {"name": "main"}, "chat": None},
        **base,
    )
    assert (first.name, first.weight, first.section.params) == ("rows", 1.0, {"delimiter": ";"})
    assert same.section.params == {"delimiter": ";", "streaming": True}
    assert same.section.chat is True, "what a part does not set is inherited"
    assert (other.name, other.section.params) == ("gsm8k", {"name": "main"})
    assert (other.section.chat, other.section.max_prompt_length) == (None, 9)
    assert parts({"source": "reasoning_gym:chain_sum"})[1].name == "chain_sum"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sorce": "x"}, r"data\.mixture\[1\]\.sorce\n.*'source'"),
        ({"source": "b", "wieght": 1}, r"data\.mixture\[1\]\.wieght\n.*'weight'"),
        ({"source": "b", "weight": 0}, r"data\.mixture\[1\]\.weight: .*greater than 0"),
        ({"source": "b", "weight": math.inf}, r"data\.mixture\[1\]\.weight: .*finite"),
        ({"source": "b", "weight": math.nan}, r"data\.mixture\[1\]\.weight: "),
        ({"source": "b", "weight": "much"}, r"data\.mixture\[1\]\.weight: .*number"),
        ({"source": "b", "name": 3}, r"data\.mixture\[1\]\.name: .*string"),
        ({"source": "b", "max_prompt_length": 0}, r"data\.mixture\[1\]\.max_prompt_length"),
        ({"source": "b", "mixture": []}, r"unknown key data\.mixture\[1\]\.mixture"),
        ({"weight": 2}, r"data\.mixture\[1\]\.name: another part is called 'rows'"),
    ],
)
def test_mistakes_in_a_part_name_its_key(entry: dict[str, Any], message: str) -> None:
    data = {"source": "rows.jsonl", "mixture": [{"source": "a"}, entry]}
    with pytest.raises(ConfigError, match=message):
        mixture_parts(load_config({"model": {"path": "m"}, "data": data}).data)


def test_errors_of_a_part_name_it(files: Path) -> None:
    whole = mixed(files)
    muls, text = (part.model_copy(update={"max_prompt_length": 3}) for part in whole.mixture)
    with pytest.raises(DataError, match=r"part 'muls'.*row 0 has a prompt of"):
        make_prompts(section(whole.source, mixture=[muls]), TOKENIZER, seed=0)
    prompts = make_prompts(section(whole.source, mixture=[text]), TOKENIZER, seed=0)
    with pytest.raises(DataError, match=r"part 'text'.*has a prompt of"):
        ids(prompts, 3)


def test_generated_rows_of_an_evaluation_are_others() -> None:
    """A part of another task has no seed of its own that could be moved."""
    whole = section(
        "reasoning_gym:chain_sum",
        columns={"prompt": "question"},
        params={"size": 3},
        mixture=[{"source": "reasoning_gym:simple_equations", "params": {"size": 3}}],
    )
    drawn = [
        {prompt.text for prompt in make_prompts(whole, TOKENIZER, seed=0, stream=stream).take(6)}
        for stream in ("train", "eval")
    ]
    assert drawn[0].isdisjoint(drawn[1])


def test_metrics_by_source_are_those_of_its_groups() -> None:
    from dataclasses import replace

    groups = [
        replace(builders.summary(0, [1.0, 0.0]), source="a"),
        replace(builders.summary(1, [1.0, 1.0]), source="a"),
        replace(builders.summary(2, [0.25, 0.25]), source="b"),
    ]
    assert source_metrics(groups) == {
        "sources/a/num_groups": 2.0,
        "sources/a/reward": 0.75,
        "sources/a/frac_reward_zero_std": 0.5,
        "sources/b/num_groups": 1.0,
        "sources/b/reward": 0.25,
        "sources/b/frac_reward_zero_std": 1.0,
    }
    assert source_metrics([builders.summary(0, [1.0, 0.0])]) == {}
