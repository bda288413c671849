"""Parameters of services, what a judge reads and how it is read, the cache, and reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.actors.cluster.placement import demand_of
from raygrpo.config import RewardSection
from raygrpo.errors import ConfigError, RewardError
from raygrpo.rewards.cache import CachedReward, completion_keys
from raygrpo.rewards.contract import Call, Reply, TrainerState
from raygrpo.rewards.judge import judge_messages, read_grade
from raygrpo.rewards.loading import anchor_reward, check_reward, reward_models
from raygrpo.rewards.params import JudgeParams, RewardModelParams
from raygrpo.rewards.reward_model import RewardModel
from raygrpo.rewards.service import secret
from tests import builders
from tests.tiny import Kind
from tests.tiny_reward import save_tiny_reward_model

JUDGE = {"base_url": "http://h/v1", "model": "m", "rubric": "{completion}"}


class TestParams:
    @pytest.mark.parametrize(
        ("func", "params", "says"),
        [
            ("http", {}, "needs url"),
            ("http", {"url": "http://h", "batchsize": 2}, "did you mean 'batch_size'"),
            ("http", {"url": "h:80/score"}, "write http://host/path"),
            ("http", {"url": "http://me:secret@h/"}, "no credentials"),
            ("http", {"url": "http://h/?api_key=abc"}, "no secret"),
            ("http", {"url": "http://h", "headers_env": {"A": "Bearer sk-1"}}, "headers_env"),
            ("judge", {**JUDGE, "api_key_env": "sk-secret"}, "api_key_env"),
            ("http", {"url": "http://h", "retries": -1}, "retries"),
            ("http", {"url": "http://h", "batch_size": "2"}, "batch_size"),
            ("judge", {**JUDGE, "rubric": "{prompt}"}, "needs the field {completion}"),
            ("judge", {**JUDGE, "rubric": "{completion.__class__}"}, "write a plain name"),
            ("judge", {**JUDGE, "rubric": "{completion!r}"}, "write a plain name"),
            ("judge", {**JUDGE, "rubric": "{completion} {"}, "rubric|expected|Single"),
            ("judge", {**JUDGE, "rubric": "{completion} {}"}, "write a plain name"),
            ("judge", {**JUDGE, "scale": [10, 1]}, "worst grade first"),
            ("judge", {**JUDGE, "temperatur": 1.0}, "did you mean 'temperature'"),
            ("judge", {"base_url": "http://h", "rubric": "{completion}"}, "needs model"),
            ("reward_model", {}, "needs path"),
            ("reward_model", {"path": "./missing"}, r"holds no config\.json"),
            ("reward_model", {"path": "empty"}, r"holds no config\.json"),
            ("reward_model", {"path": "org/model", "dtype": "float16"}, "dtype"),
            ("reward_model", {"path": "org/model", "gpu": 1}, "did you mean 'gpus'"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, here: Path, func: str, params: dict[str, Any], says: str
    ) -> None:
        (here / "empty").mkdir()
        with pytest.raises(ConfigError, match=says):
            check_reward(RewardSection(func=func, params=params))

    def test_what_is_right_passes(self, here: Path) -> None:
        (here / "model").mkdir()
        (here / "model" / "config.json").write_text("{}")
        for func, params in (
            ("http", {"url": "https://h/score", "request_timeout_s": 5}),
            ("judge", {**JUDGE, "scale": [1, 5], "rubric": "{prompt} {{}} {completion} {gold}"}),
            ("reward_model", {"path": "model", "gpus": 0.5}),
            ("reward_model", {"path": "org/model"}),
        ):
            check_reward(RewardSection(func=func, params=params))

    def test_a_models_path_is_made_absolute_and_a_hub_id_is_not(self, here: Path) -> None:
        (here / "model").mkdir()
        local = RewardSection(func="reward_model", params={"path": "model", "count": 2})
        anchored = anchor_reward(local)
        assert anchored.params == {"path": str(here / "model"), "count": 2}
        remote = RewardSection(func="reward_model", params={"path": "org/model"})
        assert anchor_reward(remote) == remote

    def test_the_cluster_must_hold_the_models(self) -> None:
        rewards = [
            {"func": "reward_model", "params": {"path": "o/m", "count": 3, "gpus": 0.5}},
            {"func": "reward_model", "name": "cpu", "params": {"path": "o/m"}},
            {"func": "exact"},
        ]
        without = demand_of(builders.config(rewards=rewards[2:]))
        demand = demand_of(builders.config(rewards=rewards))
        assert demand.num_gpus == without.num_gpus + 1.5
        assert demand.num_processes == without.num_processes + 4
        assert "3 reward models (reward_model) x 0.5" in demand.gpu_text

    def test_a_function_of_that_name_is_no_model(self) -> None:
        passed = RewardSection(func="reward_model", name="reward_model")
        assert reward_models([passed]) == {}


class TestGrades:
    @pytest.mark.parametrize(
        "answer",
        [
            *("", " \n ", "SCORE: 11", "SCORE: -1", "SCORE:", "SCORE: 7/10", "score: 7"),
            *('{"score": "7"}', '{"score": true}', '{"score": null}', '{"score": NaN}'),
            *('{"score": 1e999}', '{"score": 1' + "0" * 400 + "}", '{"grade": 7}', "[7]", "7"),
            *("SCORE: 7\nbut then again", "The text says SCORE: 7", '{"score": 7} ok'),
            *("[" * 20_000, "SCORE: " + "9" * 5000),
            "the text says bla\u2028SCORE: 10",
        ],
    )
    def test_no_grade(self, answer: str) -> None:
        assert read_grade(answer, 0, 10) is None

    @given(st.floats(-5, 5), st.text(max_size=20))
    def test_a_grade_is_read_in_both_forms(self, grade: float, before: str) -> None:
        grade = round(grade, 3)
        assert read_grade(f'{{"score": {grade!r}, "why": "x"}}', -5, 5) == grade
        assert read_grade(f"{before}\nSCORE: {grade:.3f}\n", -5, 5) == grade

    @given(st.text())
    def test_anything_is_read_without_a_failure(self, answer: str) -> None:
        grade = read_grade(answer, 0, 10)
        assert grade is None or 0 <= grade <= 10

    @given(st.text())
    def test_the_text_to_grade_cannot_hold_its_mark(self, completion: str) -> None:
        params = JudgeParams.model_validate({**JUDGE, "rubric": "Q: {prompt}\n{completion}"})
        _, user = judge_messages(params, {"prompt": "p"}, completion)
        mark = user["content"].partition("<text-")[2][:16]
        assert mark not in completion
        assert user["content"].count(f"</text-{mark}>") == 1


@dataclass
class Counting:
    """A reward that keeps what it was asked for: the text's length, "fail" errored, "none" None."""

    name: str = "r"
    seen: list[list[str]] = field(default_factory=list)

    def start(self) -> None: ...

    def close(self) -> None: ...

    def call(self, call: Call) -> Reply:
        texts = list(call.completions)
        self.seen.append(texts)
        assert [len(ids) for ids in call.completion_ids] == [len(text) for text in texts]
        return Reply(
            parts=tuple(None if t in ("fail", "none") else float(len(t)) for t in texts),
            errors=tuple("r: no" if t == "fail" else None for t in texts),
            metrics={"m": (1.0,)},
            extras={"answer": tuple(t.upper() for t in texts)} if "plain" not in texts else {},
            seconds=0.5,
        )


def call_of(texts: Sequence[Any], prompt: Any = "p", **columns: Any) -> Call:
    return Call(
        prompt=prompt,
        columns=columns,
        completions=list(texts),
        completion_ids=[[0] * len(text) for text in texts],
        trainer_state=TrainerState(global_step=0, max_steps=1),
    )


class TestCache:
    def test_what_came_before_is_not_sent_again(self) -> None:
        inner = Counting()
        cached = CachedReward(inner)
        first = cached.call(call_of(["a", "bb", "a", "none"], answer=1))
        assert first.parts == (1.0, 2.0, 1.0, None) and first.errors == (None,) * 4
        assert first.metrics == {"m": (1.0,), "rewards/r/cache_hit_frac": (0.25,)}
        assert first.extras == {"answer": ("A", "BB", "A", "NONE")}
        second = cached.call(call_of(["none", "bb", "ccc"], answer=1))
        assert second.parts == (None, 2.0, 3.0)
        assert second.extras == {"answer": ("NONE", "BB", "CCC")}
        third = cached.call(call_of(["a", "ccc"], answer=1))
        assert third.parts == (1.0, 3.0) and third.seconds == 0.0
        assert third.metrics == {"rewards/r/cache_hit_frac": (1.0,)}
        assert inner.seen == [["a", "bb", "none"], ["ccc"]]

    def test_failures_are_not_kept(self) -> None:
        inner = Counting()
        cached = CachedReward(inner)
        for _ in range(2):
            reply = cached.call(call_of(["fail", "a", "fail"]))
            assert reply.errors == ("r: no", None, "r: no") and reply.parts == (None, 1.0, None)
        assert inner.seen == [["fail", "a"], ["fail"]]

    def test_the_oldest_goes_first_and_large_extras_are_not_kept(self) -> None:
        inner = Counting()
        cached = CachedReward(inner, capacity=2)
        for texts in (["a"], ["bb"], ["a"], ["ccc"], ["a"], ["bb"]):
            cached.call(call_of(texts))
        assert inner.seen == [["a"], ["bb"], ["ccc"], ["bb"]]
        for _ in range(2):
            cached.call(call_of(["x" * 2000]))
        assert inner.seen[4:] == [["x" * 2000]] * 2

    def test_extras_that_only_some_have_are_filled_with_none(self) -> None:
        cached = CachedReward(Counting())
        cached.call(call_of(["a"]))
        assert cached.call(call_of(["a", "plain"])).extras == {"answer": ("A", None)}

    def test_keys_tell_apart_what_differs(self) -> None:
        array = np.arange(2000)
        other = array.copy()
        other[1000] = -1  # where a repr leaves out the middle
        calls = [
            call_of(["a", "b"]),
            call_of(["a"], prompt="q"),
            call_of(["a"], prompt=[{"role": "user", "content": "p"}]),
            *(call_of(["a"], answer=answer) for answer in (1, "1", 1.0, True, None, [1], {"x": 1})),
            call_of(["a"], answer=array),
            call_of(["a"], answer=other),
            call_of(["a"], answer={("a", "tuple"): 1}),
            call_of([[{"role": "assistant", "content": "a"}]]),
        ]
        keys = [key for call in calls for key in completion_keys(call)]
        assert len(set(keys)) == len(keys)
        tokens = replace(call_of(["a"]), completion_ids=[[7]])
        assert completion_keys(tokens)[0] not in keys

    def test_keys_do_not_depend_on_what_equal_rows_share(self) -> None:
        text = "".join(["same", " text"])
        shared = call_of(["a"], x=text, y=text)
        apart = call_of(["a"], x="".join(["same", " text"]), y="".join(["same", " te", "xt"]))
        assert completion_keys(shared) == completion_keys(apart)


def test_a_secret_is_never_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk-secret\n")
    assert secret("KEY") == "sk-secret", "files that secrets come from end in a newline"
    monkeypatch.setenv("KEY", "sk-sec\nret")
    with pytest.raises(RewardError, match="KEY holds characters") as caught:
        secret("KEY")
    assert "sk-sec" not in str(caught.value)


def plain_references(directory: Path, *texts: str, label: int = 0) -> Any:
    """About the logit of each text, alone and without padding, through transformers itself."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    logits = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            logits.append(float(model(input_ids=ids).logits[0, label]))
    # fp32 with other shapes of the same sums.
    return pytest.approx(logits, rel=1e-4, abs=1e-5)


def rewards_of(model: RewardModel, prompt: Any, answers: Sequence[Any]) -> list[float]:
    return model.score(model.encode(prompt, answers)[0])


class TestRewardModel:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save_tiny_reward_model(tmp_path / "m")

    @pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
    def test_padding_and_order_change_nothing(self, tmp_path: Path, kind: Kind) -> None:
        path = save_tiny_reward_model(tmp_path / "m", kind)
        model = RewardModel(RewardModelParams(path=str(path), batch_size=2))
        answers = ["4", "so it is 12, I think", "", "four", "1" * 60]
        rewards = rewards_of(model, "2+2=", answers)
        assert rewards == plain_references(path, *("2+2=" + answer for answer in answers))
        assert len({round(reward, 3) for reward in rewards}) == 5

    def test_an_encoder_does_not_read_its_padding(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        from tests.tiny import tiny_tokenizer

        tokenizer = tiny_tokenizer()
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = BertConfig(
            **shape, vocab_size=len(tokenizer), num_attention_heads=4, num_labels=1, pad_token_id=0
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            BertForSequenceClassification(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model = RewardModel(RewardModelParams(path=str(tmp_path)))
        rewards = rewards_of(model, "2+2=", ["4", "so it is 12, I think"])
        assert rewards == plain_references(tmp_path, "2+2=4", "2+2=so it is 12, I think")

    @pytest.mark.parametrize(
        ("template", "conversational", "text"),
        [
            (None, True, "<user>2+2=\n<assistant>4\n"),
            ("chat", False, "<user>2+2=\n<assistant>4\n"),
            (None, False, "2+2=4"),
            ("plain", True, "2+2=\n4"),
        ],
    )
    def test_chat_and_plain(
        self, path: Path, template: Any, conversational: bool, text: str
    ) -> None:
        model = RewardModel(RewardModelParams(path=str(path), template=template))
        prompt: Any = [{"role": "user", "content": "2+2="}] if conversational else "2+2="
        answer: Any = [{"role": "assistant", "content": "4"}] if conversational else "4"
        assert rewards_of(model, prompt, [answer]) == plain_references(path, text)

    def test_what_is_too_long_loses_its_beginning(self, path: Path) -> None:
        model = RewardModel(RewardModelParams(path=str(path), max_length=5))
        sequences, num_cut = model.encode("12345", ["678", "9", ""])
        assert num_cut == 2 and [len(ids) for ids in sequences] == [5, 5, 5]
        assert model.score(sequences) == plain_references(path, "45678", "23459", "12345")

    def test_one_label_of_several(self, tmp_path: Path) -> None:
        path = save_tiny_reward_model(tmp_path / "m", num_labels=3)
        model = RewardModel(RewardModelParams(path=str(path), label=2))
        assert rewards_of(model, "a", ["b"]) == plain_references(path, "ab", label=2)
        for label, says in ((None, "has 3 labels"), (3, "none is 3")):
            with pytest.raises(ConfigError, match=says):
                RewardModel(RewardModelParams(path=str(path), label=label))

    def test_bfloat16_is_near(self, path: Path) -> None:
        exact = rewards_of(RewardModel(RewardModelParams(path=str(path))), "2+2=", ["4"])
        model = RewardModel(RewardModelParams(path=str(path), dtype="bfloat16"))
        rewards = rewards_of(model, "2+2=", ["4"])
        assert rewards != exact
        # Eight bits of mantissa through two layers.
        assert rewards == pytest.approx(exact, rel=0.1, abs=0.1)

    @pytest.mark.filterwarnings("ignore")
    def test_a_model_that_was_not_trained_to_classify_is_refused(self, tmp_path: Path) -> None:
        from tests.tiny import save_tiny_model

        path = save_tiny_model(tmp_path / "m")
        with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
            RewardModel(RewardModelParams(path=str(path), label=0))
        with pytest.raises(ConfigError, match="does not load"):
            RewardModel(RewardModelParams(path=str(tmp_path / "none")))
