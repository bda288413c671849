"""Built-in rewards, where functions come from, how a group becomes a call, and how parts add up."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.config import RewardSection
from raygrpo.config.sections import reward_name
from raygrpo.errors import ConfigError, RewardError
from raygrpo.rewards import text
from raygrpo.rewards.contract import Reply, Setup
from raygrpo.rewards.host import RewardHost, combine
from raygrpo.rewards.loading import anchor_reward, check_reward, load_reward, pack_function
from raygrpo.rewards.values import read_values

Metrics = dict[str, float]


def section(func: str, **options: Any) -> RewardSection:
    return RewardSection(func=func, **options)


def setup(func: str, pickled: bytes | None = None, **params: Any) -> Setup:
    return Setup(
        name="r",
        func=func,
        pickled=pickled,
        params=params,
        paths=(),
        timeout_s=1.0,
        start_timeout_s=1.0,
    )


def chat(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": item}] for item in texts]


class TestText:
    @pytest.mark.parametrize(
        ("completions", "answers", "options", "scores"),
        [
            ([" 7\n", "7", "07", "7 apples", ""], ["7 "] * 5, {}, [1, 1, 0, 0, 0]),
            (["7", "7\n"], ["7", "7"], {"strip": False}, [1, 0]),
            (["\n 7 \nQ: 1+1", "8\n7"], ["7", "7"], {"first_line": True}, [1, 0]),
            (chat("a", "b"), ["a", "a"], {}, [1, 0]),
        ],
    )
    def test_exact(
        self, completions: list[Any], answers: list[str], options: Any, scores: list[float]
    ) -> None:
        assert text.exact(completions, **options, answer=answers) == scores
        assert text.exact(completions, **options, column="gold", gold=answers) == scores

    def test_message_content_may_be_blocks(self) -> None:
        blocks = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
        assert text.completion_text([{"role": "assistant", "content": blocks}]) == "42"

    @pytest.mark.parametrize(
        ("written", "value"),
        [
            ("1,234", "1234"),
            ("so it is -3.", "-3"),
            ("2.50", "2.5"),
            ("$1,234,567.80!", "1234567.8"),
            ("10-3", "3"),
            ("f(2)-3", "3"),
            ("x = -3", "-3"),
            ("x=\u22123", "-3"),
            ("1/2", "2"),
            ("1,2345", "2345"),
            ("(1,234)", "1234"),
            ("7 - 3 = 4, since 3 + 4 = 7", "7"),
            (".5", "0.5"),
            ("about 1.5e3", "1500"),
            ("12 eggs", "12"),
            ("#### 42", "42"),
        ],
    )
    def test_last_number(self, written: str, value: str) -> None:
        assert text.last_number(written) == Decimal(value)

    @pytest.mark.parametrize("written", ["", "none", "-", "e", "1e99999999999999999999"])
    def test_no_number(self, written: str) -> None:
        assert text.last_number(written) is None

    @given(st.integers(-(10**12), 10**12), st.integers(0, 6))
    def test_number_round_trip(self, units: int, places: int) -> None:
        value = Decimal(units).scaleb(-places)
        assert text.last_number(f"the answer is {value:,f}") == value

    @given(st.text())
    def test_any_text_has_a_number_or_none(self, written: str) -> None:
        found = text.last_number(written)
        assert found is None or found.is_finite()

    def test_number_compares_values_and_skips_answers_without_one(self) -> None:
        metrics: Metrics = {}
        scores = text.number(
            ["= 2.50", "it is 3", "none", "1"],
            log_metric=metrics.__setitem__,
            answer=[2.5, "2.5", "2.5", "?"],
        )
        assert scores == [1, 0, 0, None]
        assert metrics == {"number/unparsable_answer_frac": 0.25}

    @given(st.integers(-(10**40), 10**40), st.integers(-9_999_999, 9_999_999), st.integers(0, 9))
    def test_equal_numbers_are_reported_alike(self, digits: int, power: int, zeros: int) -> None:
        extras: dict[str, list[Any]] = {}
        texts = [f"{digits}e{power}", f"{digits}{'0' * zeros}e{power - zeros}", "-0.0", "none"]
        text.number(
            texts, log_metric=lambda *_: None, log_extra=extras.__setitem__, answer=["1"] * 4
        )
        first, second, zero, nothing = extras["answer"]
        assert first == second and Decimal(first) == Decimal(texts[0])
        assert (zero, nothing) == ("0", None)

    def test_exact_reports_what_it_read(self) -> None:
        extras: dict[str, list[Any]] = {}
        log = extras.__setitem__
        text.exact(["\n 7 \nQ:", "8"], first_line=True, log_extra=log, answer=["7"] * 2)
        assert extras == {"answer": ["7", "8"]}

    def test_format_matches_the_whole_text_across_lines(self) -> None:
        pattern = r"<think>.*</think>\s*<answer>.*</answer>"
        good = "<think>a\nb</think>\n<answer>1</answer>"
        assert text.format([good, good + "!", "x"], pattern=pattern) == [1, 0, 0]

    def test_length_is_the_soft_overlong_penalty(self) -> None:
        ids = [[0] * size for size in (0, 80, 81, 90, 100, 101)]
        assert text.length(ids, max_length=100, buffer=20) == [0, 0, -0.05, -0.5, -1, -1]
        assert text.length(ids, max_length=81, buffer=0) == [0, 0, 0, -1, -1, -1]


class TestValues:
    @pytest.mark.parametrize(
        ("value", "part"),
        [
            *((True, 1), (2, 2), (0.5, 0.5), (None, None), (Decimal("0.1"), 0.1)),
            *((Fraction(1, 4), 0.25), (np.float32(0.25), 0.25), (np.int64(3), 3)),
            *((np.bool_(True), 1), (np.array([4.0]), 4), (torch.tensor(1.5), 1.5)),
        ],
    )
    def test_numbers_of_all_kinds(self, value: Any, part: float | None) -> None:
        assert read_values("r", [value], 1) == ([part], [None])

    @pytest.mark.parametrize(
        ("value", "error"),
        [
            (float("nan"), "returned nan, which is not finite"),
            (float("inf"), "returned inf, which is not finite"),
            (np.float32("nan"), "returned nan, which is not finite"),
            ("1.0", "returned '1.0', which is no number"),
            (1j, "returned 1j, which is no number"),
            (10**400, f"returned {10**79}, which is no number"),
            (ValueError("no grade"), "no grade"),
            (KeyError(), "KeyError"),
        ],
    )
    def test_other_values_error_their_completion(self, value: Any, error: str) -> None:
        assert read_values("r", [1.0, value], 2) == ([1.0, None], [None, f"r: {error}"])

    def test_arrays_count_as_lists(self) -> None:
        assert read_values("r", np.arange(2), 2) == ([0, 1], [None, None])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
class TestMath:
    def score(self, completions: list[Any], answer: str) -> tuple[list[float | None], Metrics]:
        from raygrpo.rewards.math_answer import math

        metrics: Metrics = {}
        answers = [answer] * len(completions)
        return math(completions, metrics.__setitem__, answer=answers), metrics

    @pytest.mark.parametrize(
        ("answer", "right", "wrong"),
        [
            ("42", "The answer is 42.", "The answer is 41."),
            (r"\frac{1}{2}", r"so $\boxed{0.5}$", r"$\boxed{0.25}$"),
            ("1/2", r"$\frac{2}{4}$", "2"),
            ("x+1", "$1+x$", "$x-1$"),
            ("(1,2)", "$(1,2)$", "$(2,1)$"),
            (r"Thus $\boxed{3}$", r"$\boxed{3}$", "no idea"),
            ("1,234", "1234", "123"),
        ],
    )
    def test_equal_values(self, answer: str, right: str, wrong: str) -> None:
        assert self.score([right, wrong], answer)[0] == [1, 0]
        assert self.score(chat(right, wrong), answer)[0] == [1, 0]

    def test_an_answer_that_is_no_mathematics_gives_none(self) -> None:
        scores, metrics = self.score(["1", "2"], "???")
        assert scores == [None, None]
        assert metrics == {"math/unparsable_answer_frac": 1}

    def test_it_reports_what_it_read(self) -> None:
        from raygrpo.rewards.math_answer import math

        extras: dict[str, list[Any]] = {}
        texts = [r"so $\boxed{\frac{2}{4}}$", "2/4", "no idea"]
        math(texts, lambda *_: None, log_extra=extras.__setitem__, answer=["0.5"] * 3)
        # As it was parsed, not simplified: that could take for ever on what a model writes.
        assert extras["answer"] == ["1/2", "2/4", None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
class TestReasoningGym:
    @pytest.fixture(scope="class")
    def tasks(self) -> dict[str, dict[str, Any]]:
        import reasoning_gym

        names = ("chain_sum", "prime_factorization", "graph_color", "boxnet", "game_of_life")
        return {name: reasoning_gym.create_dataset(name, seed=3, size=1)[0] for name in names}

    def score(self, row: dict[str, Any], texts: list[Any], **options: Any) -> list[float]:
        from raygrpo.rewards.gym import reasoning_gym

        size = len(texts)
        columns = {name: [value] * size for name, value in row.items()}
        return reasoning_gym(texts, **columns, **options)

    @pytest.mark.parametrize("as_json", [False, True])
    def test_the_answer_scores_one_and_text_that_is_no_answer_zero(
        self, tasks: dict[str, dict[str, Any]], as_json: bool
    ) -> None:
        for name in ("chain_sum", "prime_factorization"):
            row = dict(tasks[name])
            row["metadata"] = json.dumps(row["metadata"]) if as_json else row["metadata"]
            right = row["answer"]
            texts = [f" {right}\n", f"<answer>{right}</answer> done", "no idea", "", *chat(right)]
            scores = self.score(row, texts, task=name)
            assert scores[:2] == [1, 1] and scores[4] == 1
            assert scores[2] == 0 and scores[3] < 0.1  # an empty product earns 0.01

    def test_the_row_names_its_task(self, tasks: dict[str, dict[str, Any]]) -> None:
        row = tasks["prime_factorization"]
        assert self.score(row, [row["answer"], "a \u00d7 b"]) == [1, 0]

    def test_it_reports_what_it_read(self, tasks: dict[str, dict[str, Any]]) -> None:
        extras: dict[str, list[Any]] = {}
        texts = ["a <answer> 4 </answer> b", " 5\n"]
        self.score(tasks["chain_sum"], texts, log_extra=extras.__setitem__, task="chain_sum")
        assert [answer.strip() for answer in extras["answer"]] == ["4", "5"]

    def test_unguarded_verifiers(self, tasks: dict[str, dict[str, Any]]) -> None:
        assert self.score(tasks["boxnet"], ["[1, 2, 3]", "42", '{"a": 1}']) == [0, 0, 0]
        assert self.score(tasks["game_of_life"], ['{"a": 1}', "{}"]) == pytest.approx([0, 0])
        assert self.score(tasks["graph_color"], ["nonsense"])[0] <= 0.01

    def test_a_broken_row_is_no_wrong_answer(self, tasks: dict[str, dict[str, Any]]) -> None:
        broken = {**tasks["prime_factorization"], "answer": "no factors"}
        with pytest.raises(ValueError, match="no factors"):
            self.score(broken, ["2 \u00d7 3"])

    def test_an_unknown_task_names_the_nearest(self, tasks: dict[str, dict[str, Any]]) -> None:
        with pytest.raises(ValueError, match="did you mean 'chain_sum'"):
            self.score(tasks["chain_sum"], ["1"], task="chain_sums")


class TestCheck:
    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            (section("exakt"), "did you mean 'exact'"),
            (section("exact", params={"colum": "x"}), "did you mean 'column'"),
            (section("format"), "needs pattern"),
            (section("exact", params={"strip": "no"}), "strip: "),
            (section("format", params={"pattern": "("}), "no regular expression"),
            (section("length", params={"max_length": 4, "buffer": 5}), "buffer <= max_length"),
            (section("no_such_package.rewards:f"), "no module 'no_such_package'"),
            (section("__main__:f"), "pass the function itself"),
            (section("missing.py:f"), "no reward file"),
            (section("mine.py:gold"), "did you mean 'golden'"),
            (section("broken.py:f"), "no valid Python"),
        ],
    )
    def test_what_is_wrong_is_named(self, here: Path, bad: RewardSection, says: str) -> None:
        (here / "mine.py").write_text("def golden(completions): ...\n")
        (here / "broken.py").write_text("def f(:\n")
        with pytest.raises(ConfigError, match=says):
            check_reward(bad)

    def test_all_ways_to_define_a_name_are_found_without_running_the_file(self, here: Path) -> None:
        (here / "mine.py").write_text(
            "raise SystemExit('the driver ran user code')\n"
            "from math import sin as imported\n"
            "def plain(completions): ...\n"
            "async def later(completions): ...\n"
            "left, (right, *rest) = 1, (2, 3)\n"
            "typed: int = 1\n"
            "class Holder: ...\n"
            "try:\n    import a as tried\nexcept ImportError:\n    tried = None\n"
            "if True:\n    branch = 1\nelse:\n    other = 2\n"
        )
        for name in (
            *("imported", "plain", "later", "left", "right", "rest", "typed", "Holder.method"),
            *("tried", "branch", "other"),
        ):
            check_reward(section(f"mine.py:{name}"))
        with pytest.raises(ConfigError, match="defines no 'absent'"):
            check_reward(section("mine.py:absent"))

    def test_modules_installed_or_beside_the_configuration(self, here: Path) -> None:
        (here / "beside_it.py").write_text("")
        check_reward(section("beside_it:f"))
        check_reward(section("trl.rewards:accuracy_reward"))

    def test_functions_passed_in_python_are_not_looked_up(self) -> None:
        check_reward(section("mine", name="mine"), passed={"mine"})
        with pytest.raises(ConfigError, match="unknown reward 'mine'"):
            check_reward(section("mine", name="mine"))

    def test_names_and_anchors(self, here: Path) -> None:
        assert reward_name(section("exact")) == "exact"
        assert reward_name(section("a/b.py:f")) == "f"
        assert reward_name(section("a.b:f", name="mine")) == "mine"
        assert anchor_reward(section("b.py:f")).func == f"{here}/b.py:f"
        assert anchor_reward(section("a.b:f")).func == "a.b:f"

    def test_what_cannot_be_pickled_is_refused(self) -> None:
        import threading

        lock = threading.Lock()

        def reward(completions: list[str]) -> list[float]:
            with lock:
                return [0.0 for _ in completions]

        with pytest.raises(ConfigError, match="cannot be pickled"):
            pack_function(reward)

    def test_two_rewards_of_one_name_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="distinct names"):
            RewardHost([section("a.py:f"), section("b.py:f")], {})

    def test_load_refuses_what_is_no_function(self) -> None:
        for func, says in (("decimal:Decimal", "is a class"), ("math:pi", "is a float")):
            with pytest.raises(RewardError, match=says):
                load_reward(setup(func))

    def test_load_refuses_parameters_the_function_does_not_take(self) -> None:
        packed = pack_function(lambda completions, scale: [scale for _ in completions])
        with pytest.raises(RewardError, match="takes no parameter scales"):
            load_reward(setup("r", packed, scales=1))


class TestCombine:
    def test_weighted_sum_over_parts_that_are_not_none(self) -> None:
        replies = {
            "a": Reply(parts=(1.0, None, None, 1.0), errors=(None,) * 4, metrics={"m": (1.0,)}),
            "b": Reply(
                parts=(0.5, 0.5, None, None),
                errors=(None, None, None, "b: bad"),
                metrics={"m": (2.0,)},
                extras={"x": (1, 2, 3, 4)},
            ),
        }
        scored = combine(replies, {"a": 1.0, "b": -2.0}, 4)
        assert [score.value for score in scored.scores] == [0.0, -1.0, None, None]
        assert [score.error for score in scored.scores] == [None, None, None, "b: bad"]
        assert scored.scores[3].parts == {"a": 1.0, "b": None}
        errors = {"rewards/a/error_frac": (0.0,), "rewards/b/error_frac": (0.25,)}
        assert scored.metrics == {"m": (1.0, 2.0), **errors}
        assert scored.extras == {"x": (1, 2, 3, 4)}
        assert scored.traceback is None

    def test_a_sum_that_overflows_is_an_error(self) -> None:
        replies = {name: Reply(parts=(1.7e308,), errors=(None,)) for name in "ab"}
        (score,) = combine(replies, {"a": 1.0, "b": 1.0}, 1).scores
        assert score.value is None and score.error == "the weighted sum is not finite"
