"""An actor's process: freed memory is used again, and a SIGTERM is prepared for."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import worker

from raygrpo.actors.process import KEPT, children_keep_heaps, on_sigterm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")
# Page faults of the third time that large blocks are taken, written to and freed: by the main
# thread, and by one beside twelve that have taken memory before it, as Ray's own threads have.
PROGRAM = """
import resource, threading
from raygrpo.actors.process import keep_heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def third_round(found):
    for _ in range(3):
        before = faults()
        for size in (40_000_000, 90_000_000, 3_000_000):
            bytearray(size)[::4096] = bytes(1 + (size - 1) // 4096)
    found.append(faults() - before)

done = threading.Barrier(13)
def take():
    held = [bytearray(100_000) for _ in range(10)]
    done.wait()
    done.wait()
others = [threading.Thread(target=take, daemon=True) for _ in range(12)]
[thread.start() for thread in others]
done.wait()
kept, found = keep_heap(), []
third_round(found)
thread = threading.Thread(target=third_round, args=(found,))
thread.start()
thread.join()
print(kept, *found)
done.wait()
"""
# Pages of 4 KiB of the largest two, each touched once in a round.
PAGES = (40_000_000 + 90_000_000) // 4096


def faults(**environment: str) -> tuple[bool, int, int]:
    """Whether the process says that it keeps its heap; faults of its main and another thread."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, check=True, timeout=60, env={**own, **environment},
    )  # fmt: skip
    kept, main, other = done.stdout.split()
    return kept == "True", int(main), int(other)


def test_a_process_keeps_its_main_threads_heap() -> None:
    kept, main, _ = faults()
    assert kept
    assert main < PAGES / 100


def test_a_process_started_to_keep_its_heap_does_so_on_any_thread() -> None:
    kept, main, other = faults(**KEPT)
    assert not kept, "there is nothing left to do"
    assert max(main, other) < PAGES / 100


def test_what_the_environment_says_of_the_heap_is_left_alone() -> None:
    kept, main, other = faults(MALLOC_MMAP_THRESHOLD_="1048576")
    assert not kept
    assert min(main, other) >= PAGES


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", *KEPT):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with children_keep_heaps():
        assert dict(os.environ) == {**before, **KEPT}
    assert dict(os.environ) == before
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    with children_keep_heaps():
        assert os.environ["MALLOC_ARENA_MAX"] == "4"
        assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


def test_rays_own_handler_of_a_sigterm_prepares_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Ray's own code, whose private names this depends on."""
    calls: list[str] = []
    handlers: list[Any] = []
    end = "raise_sys_exit_with_custom_error_message"
    monkeypatch.setattr(worker, end, lambda *_, **__: calls.append("end"))
    monkeypatch.setattr("ray._private.utils.set_sigterm_handler", handlers.append)
    on_sigterm(lambda: calls.append("prepare"))
    process = SimpleNamespace(core_worker=SimpleNamespace(run_task_loop=lambda: None))
    with pytest.raises(SystemExit):
        worker.Worker.main_loop(process)
    handlers[0](15, None)
    assert calls == ["prepare", "end"]
