"""Reward functions in real child processes: what they return, and every way they fail."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raygrpo.config import RewardSection
from raygrpo.errors import RewardError
from raygrpo.rewards.contract import ScoredGroup, TrainerState, make_call
from raygrpo.rewards.host import RewardHost
from raygrpo.rewards.loading import pack_function
from tests.builders import written

STATE = TrainerState(global_step=3, max_steps=10, epoch=0.5)
# Deadlines of polls for what should take milliseconds; long, because the machine may be busy.
SOON_S = 20.0


def passed(
    functions: dict[str, Callable[..., Any]], timeout_s: float = 30.0, **options: Any
) -> RewardHost:
    """A host of functions passed in Python."""
    sections = [RewardSection(func=name, timeout_s=timeout_s, **options) for name in functions]
    return RewardHost(sections, {name: pack_function(f) for name, f in functions.items()})


def values(scored: ScoredGroup) -> list[float | None]:
    return [score.value for score in scored.scores]


def only_error(scored: ScoredGroup) -> str:
    """The error that all completions share; none has a value."""
    assert values(scored) == [None] * len(scored.scores)
    (error,) = {score.error for score in scored.scores}
    assert error is not None
    return error


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls, since nothing tells one process of the end of another's child."""
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "deadline passed"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pids(path: Path, count: int) -> list[int]:
    def complete() -> bool:
        return path.exists() and path.read_text().count("\n") >= count

    wait_until(complete)
    return [int(line) for line in path.read_text().split()]


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def running_family(pid: int) -> list[int]:
    return [member for member in descendants(pid) if is_running(member)]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(descendants(os.getpid()))
    yield
    wait_until(lambda: not set(descendants(os.getpid())) - before)


class TestContract:
    def test_arguments_are_trls(self) -> None:
        seen_columns = {"answer": "2", "level": 1, "tags": ["a"], "prompt": "not this"}

        def spy(
            prompts: list[Any],
            completions: list[Any],
            completion_ids: list[Any],
            log_extra: Callable[..., None],
            log_metric: Callable[..., None],
            trainer_state: Any,
            **columns: Any,
        ) -> list[float]:
            assert prompts == ["1 + 1 ="] * 3
            assert completions == ["a", "bb", ""]
            assert completion_ids == [[0], [0, 1], [0]] and type(completion_ids[1][0]) is int
            assert columns == {"answer": ["2"] * 3, "level": [1] * 3, "tags": [["a"]] * 3}
            columns["tags"][0].append("changed")
            assert columns["tags"][1] == ["a"]
            assert (trainer_state.global_step, trainer_state.max_steps) == (3, 10)
            assert trainer_state.epoch == 0.5
            log_extra("seen", ["x", 2, None])
            log_extra("too_short", ["x"])
            log_metric("hits", np.float32(2))
            log_metric("hits", 3)
            log_metric("broken", float("nan"))
            return [0.0, 1.0, 2.0]

        with passed({"spy": spy}) as host:
            scored = host.score(written(["a", "bb", ""], seen_columns), STATE)
        assert scored.traceback is None
        assert values(scored) == [0, 1, 2]
        assert scored.metrics == {"hits": (2.0, 3.0), "rewards/spy/error_frac": (0.0,)}
        assert scored.extras == {"seen": ("x", 2, None)}
        assert scored.reward_s.keys() == {"spy"} and scored.reward_s["spy"] > 0

    def test_conversational(self) -> None:
        call = make_call(written(["2", "3"], chat=True), STATE)
        assert call.prompt == [{"role": "user", "content": "1 + 1 ="}]
        assert call.completions == [[{"role": "assistant", "content": c}] for c in ("2", "3")]

    def test_several_of_all_kinds_with_weights_and_none(self) -> None:
        offset = 10.0

        def closure(completions: list[str]) -> list[float | None]:
            return [None if c == "skip" else offset for c in completions]

        async def later(completions: list[str], **_: Any) -> list[float | None]:
            await asyncio.sleep(0)
            return [None if c in ("skip", "half") else 1.0 for c in completions]

        class Scaled:
            def __call__(self, completions: list[str], scale: float = 1.0) -> list[float | None]:
                return [None if c == "skip" else scale for c in completions]

        functions = {
            "closure": closure,
            "later": later,
            "partial": functools.partial(Scaled(), scale=3.0),
            "object": Scaled(),
        }
        sections = [
            RewardSection(func=name, weight=-0.5 if name == "later" else 1.0) for name in functions
        ]
        packed = {name: pack_function(function) for name, function in functions.items()}
        with RewardHost(sections, packed) as host:
            scored = host.score(written(["full", "half", "skip"]), STATE)
        assert values(scored) == [13.5, 14.0, None]
        assert [score.error for score in scored.scores] == [None] * 3
        parts = {"closure": 10.0, "later": None, "partial": 3.0, "object": 1.0}
        assert scored.scores[1].parts == parts

    def test_one_event_loop_serves_all_calls(self) -> None:
        loops: list[Any] = []

        async def keeps_a_client(completions: list[str]) -> list[float]:
            loops.append(asyncio.get_running_loop())
            return [float(all(loop is loops[0] for loop in loops)) for _ in completions]

        with passed({"f": keeps_a_client}) as host:
            assert values(host.score(written(["a"]), STATE)) == [1]
            assert values(host.score(written(["a"]), STATE)) == [1]

    def test_from_files_with_neighbours_and_from_modules_of_the_directory(self, here: Path) -> None:
        (here / "neighbour.py").write_text("BONUS = 5.0\n")
        (here / "mine.py").write_text(
            "from neighbour import BONUS\n"
            "def f(completions, scale, **kwargs):\n"
            "    return [scale * len(c) + BONUS for c in completions]\n"
        )
        package = here / "my_rewards_package"
        package.mkdir()
        (package / "deep.py").write_text("def g(completions): return [1 for _ in completions]\n")
        sections = [
            RewardSection(func="mine.py:f", params={"scale": 2}),
            RewardSection(func="my_rewards_package.deep:g"),
        ]
        with RewardHost(sections, {}) as host:
            assert values(host.score(written(["a", "bbb"]), STATE)) == [8, 12]

    def test_trl_rewards_run_unchanged(self, here: Path) -> None:
        from trl.rewards import (  # the oracle, called directly
            accuracy_reward,
            get_cosine_scaled_reward,
            get_repetition_penalty_reward,
            get_soft_overlong_punishment,
            reasoning_accuracy_reward,
            think_format_reward,
        )

        (here / "mine.py").write_text(
            "from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward\n"
            "from trl.rewards import get_soft_overlong_punishment\n"
            "overlong = get_soft_overlong_punishment(40, 20)\n"
            "cosine = get_cosine_scaled_reward(max_len=50)\n"
            "repetition = get_repetition_penalty_reward(ngram_size=2)\n"
        )
        sections = [
            RewardSection(func="trl.rewards:accuracy_reward"),
            RewardSection(func="trl.rewards:think_format_reward"),
            RewardSection(func="trl.rewards:reasoning_accuracy_reward"),
            *(RewardSection(func=f"mine.py:{f}") for f in ("overlong", "cosine", "repetition")),
        ]
        texts = [r"<think>so</think> $\boxed{\frac{1}{2}}$", r"$\boxed{3}$", "none " * 7]
        group = written(texts, {"solution": "$0.5$"}, chat=True)
        with RewardHost(sections, {}) as host:
            scored = host.score(group, STATE)
        assert scored.traceback is None
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        ids = [list(range(len(text))) for text in texts]
        expected = {
            "reasoning_accuracy_reward": reasoning_accuracy_reward(completions, ["$0.5$"] * 3),
            "cosine": get_cosine_scaled_reward(max_len=50)(completions, ["$0.5$"] * 3, ids),
            "repetition": get_repetition_penalty_reward(ngram_size=2)(ids),
            "accuracy_reward": accuracy_reward(completions, ["$0.5$"] * 3),
            "think_format_reward": think_format_reward(completions),
            "overlong": get_soft_overlong_punishment(40, 20)(ids),
        }
        assert expected["accuracy_reward"] == [1, 0, 0] and min(expected["overlong"]) < 0
        for name, parts in expected.items():
            assert [score.parts[name] for score in scored.scores] == parts
        assert scored.extras["solution"] == ("$0.5$",) * 3

    def test_built_ins_in_children(self) -> None:
        row = {
            "question": "State the final answer to: 1 + 1",
            "answer": "2",
            "metadata": '{"source_dataset": "chain_sum"}',
            "task": "a column, which is no parameter",
        }
        sections = [
            RewardSection(func="exact"),
            RewardSection(func="number"),
            RewardSection(func="math"),
            RewardSection(func="format", params={"pattern": "[0-9]"}),
            RewardSection(func="length", params={"max_length": 8, "buffer": 4}),
            RewardSection(func="reasoning_gym"),
        ]
        with RewardHost(sections, {}) as host:
            scored = host.score(written(["2", "so 2.0", "3"], row), STATE)
        assert scored.traceback is None
        parts = [tuple(score.parts.values()) for score in scored.scores]
        assert parts[0] == (1, 1, 1, 1, 0, 1)
        assert parts[1][:5] == (0, 1, 1, 0, -0.5)
        assert parts[2] == (0, 0, 0, 1, 0, 0)


def sleep_for_ever() -> None:
    signal.pause()


def hold_the_interpreter() -> None:
    import re

    re.fullmatch("(a+)+", "a" * 64 + "b")  # exponential, in C, without releasing the GIL


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_its_group() -> None:
    os.killpg(0, signal.SIGKILL)


def close_everything() -> None:
    os.closerange(3, 256)


def return_twice() -> list[float]:
    if os.fork() == 0:
        return [9.0, 9.0]
    os.wait()  # the fork must end where it comes back to the caller
    return [1.0, 1.0]


# By name: what a function does, the error, and what the traceback names.
Cases = dict[str, tuple[Callable[[], Any], str, str]]
BAD: Cases = {
    "raises": (lambda: 1 / 0, "raised: ZeroDivisionError: division by zero", "ZeroDivisionError"),
    "exits": (lambda: sys.exit(0), "raised: SystemExit: 0", "SystemExit"),
    "is short": (lambda: [1.0], "returned 1 rewards for 2 completions", "ValueError"),
    "is a float": (lambda: 1.0, "returned a float, not a list of 2 rewards", "TypeError"),
    "is None": (lambda: None, "returned a NoneType", "TypeError"),
    "is text": (lambda: "ab", "returned a str", "TypeError"),
    "ends": (lambda: os._exit(3), "its process ended with exit code 3", "exit code 3"),
    "dies": (kill_itself, "its process ended by SIGKILL", "SIGKILL"),
    "kills its group": (signal_its_group, "its process ended by SIGKILL", "SIGKILL"),
    "is deaf": (close_everything, "its process ended with exit code 1", "exit code 1"),
}
LATE: Cases = {
    "sleeps": (sleep_for_ever, "gave no answer within 3 s", "in sleep_for_ever"),
    "spins": (hold_the_interpreter, "gave no answer within 3 s", "in hold_the_interpreter"),
}


def bad_or_size(completions: list[str]) -> Any:
    """Does what the first completion names in `BAD` or `LATE`, else returns their lengths."""
    bad = (BAD | LATE).get(completions[0])
    return bad[0]() if bad else [float(len(text)) for text in completions]


class TestFailures:
    @pytest.mark.parametrize(("cases", "timeout_s"), [(BAD, 30.0), (LATE, 3.0)])
    def test_the_group_is_errored_and_the_next_call_works(
        self, cases: Cases, timeout_s: float
    ) -> None:
        functions = {"f": bad_or_size, "good": lambda completions: [1.0 for _ in completions]}
        with passed(functions, timeout_s=timeout_s) as host:
            for name, (_, says, trace) in cases.items():
                started = time.monotonic()
                failed = host.score(written([name, "x"]), STATE)
                assert time.monotonic() - started < SOON_S
                assert only_error(failed).startswith("f: ") and says in only_error(failed)
                assert failed.traceback is not None and trace in failed.traceback
                assert [score.parts["good"] for score in failed.scores] == [1, 1]
                assert values(host.score(written(["xx", "xxx"]), STATE)) == [3, 4]

    def test_a_child_that_dies_between_calls_costs_nothing(self, tmp_path: Path) -> None:
        pids = tmp_path / "pids"

        def note(completions: list[str]) -> list[float]:
            with pids.open("a") as file:
                file.write(f"{os.getpid()}\n")
            return [1.0 for _ in completions]

        with passed({"f": note}) as host:
            host.score(written(["x"]), STATE)
            (pid,) = read_pids(pids, 1)
            os.kill(pid, signal.SIGKILL)
            # Until it is collected: while any of its threads is left, its end may still be open.
            wait_until(lambda: not Path(f"/proc/{pid}").exists())
            assert values(host.score(written(["x"]), STATE)) == [1]

    def test_a_fork_that_returns_as_well_does_not_answer_twice(self) -> None:
        def forks(completions: list[str]) -> list[float]:
            return return_twice() if completions[0] == "bad" else [len(c) for c in completions]

        with passed({"f": forks}) as host:
            assert values(host.score(written(["bad", "x"]), STATE)) == [1, 1]
            for size in (1, 2, 3):
                assert values(host.score(written(["x" * size]), STATE)) == [size]

    def test_loud_functions_and_large_payloads(self, capfd: pytest.CaptureFixture[str]) -> None:
        size_chars = 3_000_000

        def loud(completions: list[str], log_extra: Callable[..., None]) -> list[float]:
            print("o" * size_chars)
            print("e" * size_chars, file=sys.stderr)
            os.write(1, b"straight to the descriptor\n")
            log_extra("echo", completions)
            return [float(len(c)) for c in completions]

        with passed({"loud": loud}) as host:
            texts = ["x" * size_chars, "\ud800 is half a character"]
            scored = host.score(written(texts), STATE)
        assert values(scored) == [size_chars, len(texts[1])]
        assert scored.extras["echo"] == (texts[0], "? is half a character")
        printed = capfd.readouterr()
        assert printed.out.count("o") >= size_chars and printed.err.count("e") >= size_chars


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import no_such_module", r"(?s)cannot be loaded: ModuleNotFound.*mine\.py., line 1"),
        ("raise SystemExit(4)", "SystemExit: 4"),
        ("import os; os._exit(7)", "exit code 7"),
        ("import signal; signal.pause()", "was not loaded within 0.5 s"),
        ("f = 3", "is a int, not a function"),
    ],
)
def test_modules_that_cannot_be_loaded(here: Path, source: str, says: str) -> None:
    (here / "mine.py").write_text(source)
    sections = [RewardSection(func="mine.py:f"), RewardSection(func="exact")]
    deadline_s = 0.5 if "pause" in source else 60.0
    with pytest.raises(RewardError, match=says):
        RewardHost(sections, {}, start_timeout_s=deadline_s).start()


def spawn_family(path: str) -> Callable[..., Any]:
    """A reward that starts a grandchild of every kind, writes all pids, then never returns.

    The kinds: forked, holding the connection; in a session of its own; a double-forked daemon.
    """

    def reward(completions: list[str]) -> Any:
        if completions[0] != "bad":
            return [1.0 for _ in completions]

        def note() -> None:
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\n")

        def stay() -> None:
            note()
            while True:
                signal.pause()

        if os.fork() == 0:
            stay()
        if os.fork() == 0:
            os.setsid()
            stay()
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                stay()
            os._exit(0)
        note()
        read_pids(Path(path), 4)  # all are there before any is ended
        if completions[1] == "exits":
            os._exit(5)
        signal.pause()
        return None

    return reward


HOST_SCRIPT = """
import sys, threading
sys.path.insert(0, {tests!r})
from test_reward_children import *
path = sys.argv[1]
with passed({{"f": spawn_family(path), "idle": spawn_family(path)}}, timeout_s=600) as host:
    # From a thread that ends: nothing may depend on the thread that started a child.
    thread = threading.Thread(target=lambda: host.score(written(["good", "x"]), STATE))
    thread.start()
    thread.join()
    print("ready", flush=True)
    host.score(written(["bad", "x"]), STATE)
"""


class TestNoOrphans:
    @pytest.mark.parametrize("how", ["hangs", "exits"])
    def test_grandchildren_end_with_a_failed_child(self, tmp_path: Path, how: str) -> None:
        path = tmp_path / "pids"
        with passed({"f": spawn_family(str(path))}, timeout_s=2.0) as host:
            failed = host.score(written(["bad", how]), STATE)
            assert ("exit code 5" if how == "exits" else "within 2 s") in only_error(failed)
            pids = read_pids(path, 4)
            assert len(set(pids)) == 4
            wait_until(lambda: not any(is_running(pid) for pid in pids))
            assert values(host.score(written(["x"]), STATE)) == [1]

    @pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
    def test_a_killed_host_leaves_no_process(self, tmp_path: Path, sent: signal.Signals) -> None:
        path = tmp_path / "pids"
        script = HOST_SCRIPT.format(tests=str(Path(__file__).parent))
        command = [sys.executable, "-c", script, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            try:
                noted = read_pids(path, 8)
                # Two guards, two children, and three others of each, as every pid noted.
                wait_until(lambda: len(running_family(process.pid)) == 10)
                family = running_family(process.pid)
                assert set(noted) < set(family)
                process.send_signal(sent)
                process.wait(SOON_S)
            finally:
                process.kill()
            wait_until(lambda: not any(is_running(pid) for pid in family))

    def test_close_during_a_call(self, tmp_path: Path) -> None:
        import threading

        path = tmp_path / "pids"
        host = passed({"f": spawn_family(str(path))}, timeout_s=600)
        host.start()
        results: list[ScoredGroup] = []
        scoring = threading.Thread(
            target=lambda: results.append(host.score(written(["bad", "x"]), STATE))
        )
        scoring.start()
        pids = read_pids(path, 4)
        host.close()
        scoring.join(SOON_S)
        assert not scoring.is_alive() and only_error(results[0])
        wait_until(lambda: not any(is_running(pid) for pid in pids))
