"""A thread per piece of work: its result and errors come back, and it is gone afterwards."""

from __future__ import annotations

import threading

import pytest

from raygrpo.actors.process import in_new_thread


def test_the_thread_is_named_and_ends() -> None:
    thread = in_new_thread(threading.current_thread, "stage").result(10.0)
    assert thread is not threading.current_thread()
    assert thread.name.startswith("stage")
    # An idle worker kept for the next call would keep its OpenMP team too.
    thread.join(10.0)
    assert not thread.is_alive()


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    def fail() -> None:
        raise ValueError("corrupt bucket")

    with pytest.raises(ValueError, match="corrupt bucket"):
        in_new_thread(fail, "stage").result(10.0)
