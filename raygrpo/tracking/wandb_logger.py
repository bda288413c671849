"""Weights & Biases: one wandb run for the whole run, resumed or not, with the step as its axis.

Training never waits for wandb: one thread makes every call to wandb, from a bounded queue.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import re
import secrets
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.storage.run_dir import RunDir

_PROJECT = "raygrpo"  # unless WANDB_PROJECT names another, as in transformers
INIT_TIMEOUT_S = 60.0
_LOGIN_TIMEOUT_S = 30
# A lost network must not keep the end of a run waiting; unsent records lie on disk.
FINISH_TIMEOUT_S = 120.0
MAX_QUEUED = 256
_COLUMNS = ("step", "prompt", "completion", "reward", "advantage")  # then the rewards
_SECRET = re.compile(
    r"(^|[_-])((api|access|private|secret)[_-]?key|secret|passw(or)?d|passphrase|credentials?|auth"
    r"|bearer|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)token)$",
    re.I,
)
_LOGIN_IN_URL = re.compile(r"//[^/@\s]+@")

Event = tuple[str, dict[str, Any]]
Outbox = queue.SimpleQueue[Event]
# The kind of an event that only run.json gets: the address of the wandb run.
_ADDRESS = "address"


class WandbLogger:
    """Logs steps to one wandb run, and never blocks. A failure of wandb is an event, no error.

    run.json keeps the id of the wandb run, so that a resumed run continues it, and its address.
    Files go below the run directory. Without credentials, ``online`` becomes ``offline`` (event
    ``wandb_offline``). After a failure (``wandb_failed``) the logger sends nothing more. If wandb
    is too slow, the oldest queued records are dropped (``wandb_slow`` once, ``wandb_dropped`` with
    their number at the end).

    Events come from wandb's thread: the caller fetches them by `take_events`.
    """

    def __init__(self, run_dir: RunDir, config: RunConfig) -> None:
        self._run_dir = run_dir
        self._events: Outbox = queue.SimpleQueue()
        self._worker: _Worker | None = None
        if config.tracking.wandb != "disabled":
            run_id: str | None = run_dir.facts.get("wandb_id")
            if run_id is None:
                run_id = secrets.token_hex(8)
                run_dir.note(wandb_id=run_id)  # here: one thread alone writes run.json
            self._worker = _Worker(run_dir, config, run_id, self._events)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues one step."""
        if self._worker is not None:
            self._worker.put({**metrics, "step": step})

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Queues rows of the ``completions`` table."""
        if self._worker is not None and rows:
            self._worker.put(_Rows(step, tuple(rows)))

    def take_events(self) -> list[Event]:
        """The events since the last call; also writes the wandb run's address to run.json."""
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                kind, fields = self._events.get_nowait()
                if kind == _ADDRESS:
                    self._run_dir.note(**fields)
                else:
                    events.append((kind, fields))
        return events

    def close(self, exit_code: int) -> None:
        """Sends what is queued and ends the run, within a deadline; more than once is fine."""
        if self._worker is None:
            return
        worker, self._worker = self._worker, None
        unsent = worker.finish(exit_code, FINISH_TIMEOUT_S)
        if unsent is not None:
            reason = f"no end within {FINISH_TIMEOUT_S:g} s, {unsent} records not sent"
            self._events.put(("wandb_failed", {"action": "finish", "error": reason}))
        if worker.num_dropped:
            self._events.put(("wandb_dropped", {"records": worker.num_dropped}))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The completions of a step, rows of wandb's table."""

    step: int
    rows: tuple[Mapping[str, Any], ...]


class _Worker:
    """The thread that owns the wandb run; a daemon, so that a hanging wandb delays no exit."""

    def __init__(self, run_dir: RunDir, config: RunConfig, run_id: str, events: Outbox) -> None:
        self.num_dropped = 0
        self._arguments = (run_dir, config, run_id, events)
        self._events = events
        self._items: deque[dict[str, Any] | _Rows] = deque()
        self._changed = threading.Condition()
        self._exit_code: int | None = None
        self._ended = False
        self._run: Any = None
        self._table: Any = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, item: dict[str, Any] | _Rows) -> None:
        """Queues an item; a full queue drops its oldest item, since people look at the newest."""
        with self._changed:
            if self._ended:
                return
            if len(self._items) >= MAX_QUEUED:
                self._items.popleft()
                self.num_dropped += 1
                if self.num_dropped == 1:
                    self._events.put(("wandb_slow", {"queued": MAX_QUEUED}))
            self._items.append(item)
            self._changed.notify()

    def finish(self, exit_code: int, timeout_s: float) -> int | None:
        """Waits for the end; None, or after the deadline the number of unsent items."""
        with self._changed:
            self._exit_code = exit_code
            self._changed.notify()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return None
        with self._changed:
            self._ended = True  # a call that returns later sends nothing more
            unsent = len(self._items)
        atexit.register(_end_service)
        return unsent

    def _work(self) -> None:
        action = "init"
        try:
            self._run = _start(*self._arguments)
            action = "log"
            while (item := self._next()) is not None:
                self._send(item)
            action = "finish"
            if not self._ended:
                self._run.finish(exit_code=self._exit_code)
        # The one place that supervises wandb: training goes on without it, whatever it raises
        # (errors of its own, of the network, of its helper process).
        except Exception as error:
            with self._changed:
                given_up, self._ended = self._ended, True
                self._items.clear()
            if not given_up:
                reason = f"{type(error).__name__}: {error}"
                self._events.put(("wandb_failed", {"action": action, "error": reason}))
            if action != "log":
                atexit.register(_end_service)

    def _next(self) -> dict[str, Any] | _Rows | None:
        """Waits for the oldest item; None once the queue is empty and the run has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._exit_code is not None)
            return self._items.popleft() if self._items and not self._ended else None

    def _send(self, item: dict[str, Any] | _Rows) -> None:
        if isinstance(item, dict):
            self._run.log(item)
            return
        import wandb

        if self._table is None:
            rewards = (name for row in item.rows for name in row)
            columns = list(dict.fromkeys((*_COLUMNS, *rewards)))
            self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL")
        for row in item.rows:
            self._table.add_data(*(_cell(row.get(name)) for name in self._table.columns))
        # wandb sends the rows added since the last call alone.
        self._run.log({"step": item.step, "completions": self._table})


def _start(run_dir: RunDir, config: RunConfig, run_id: str, events: Outbox) -> Any:
    import wandb

    mode = config.tracking.wandb
    # `wandb.init` would ask on the terminal, in the middle of the live display.
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode = "offline"
        reason = (
            "no credentials: run `wandb login` or set WANDB_API_KEY; `wandb sync` sends it later"
        )
        events.put(("wandb_offline", {"reason": reason}))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or _PROJECT,
        name=os.environ.get("WANDB_NAME") or run_dir.root.name,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=run_dir.root,
        config=redacted(config.model_dump(mode="json")),
        # A git remote, or the command line, can hold a password; standard output is in logs/.
        settings=wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            login_timeout=_LOGIN_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if mode == "online" and run.url:
        events.put((_ADDRESS, {"wandb_url": run.url}))
    return run


def _end_service() -> None:
    """Kills wandb's helper process: wandb's own exit handler would wait for it for ever.

    The run's .wandb file holds the records that were not sent.
    """
    import psutil
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    # Without its helper process wandb raises OSError, or exits.
    with contextlib.suppress(OSError, SystemExit):
        wandb.teardown()


def _cell(value: Any) -> Any:
    """A plain value as it is; any other value, such as messages, as JSON."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def redacted(tree: Any) -> Any:
    """The configuration without values of secret keys (``api_key``), and without logins in URLs."""
    if isinstance(tree, Mapping):
        return {
            name: "<redacted>" if _SECRET.search(str(name)) and value else redacted(value)
            for name, value in tree.items()
        }
    if isinstance(tree, list):
        return [redacted(item) for item in tree]
    if isinstance(tree, str):
        return _LOGIN_IN_URL.sub("//<redacted>@", tree)
    return tree
