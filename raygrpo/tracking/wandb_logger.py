"""Weights & Biases: one run id for the whole run, resumed or not, with the step as its own axis."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.run_dir import RunDir

_PROJECT = "raygrpo"  # unless WANDB_PROJECT names another, as in transformers
_INIT_TIMEOUT_S = 60.0
_LOGIN_TIMEOUT_S = 30
# Without one, a lost network keeps the end of a run waiting for ever; what is left lies on disk.
_FINISH_TIMEOUT_S = 120.0
_SECRET = re.compile(
    r"(^|[_-])((api|access|private|secret)[_-]?key|secret|passw(or)?d|passphrase|credentials?|auth"
    r"|bearer|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)token)$",
    re.I,
)
_LOGIN_IN_URL = re.compile(r"//[^/@\s]+@")

EventSink = Callable[[str, dict[str, Any]], None]


class WandbLogger:
    """Logs steps to one wandb run; its failures are events (``wandb_failed``), never the run's.

    The run's id is kept in run.json, so that a resumed run continues it; so is its address when it
    has one. Files go below the run directory. Without credentials, ``online`` becomes ``offline``
    (event ``wandb_offline``). After a failure nothing more is sent.
    """

    def __init__(self, run_dir: RunDir, config: RunConfig, on_event: EventSink) -> None:
        self._on_event = on_event
        self._run: Any = None
        if config.tracking.wandb != "disabled":
            self._run = self._guard("init", lambda: _start(run_dir, config, on_event))

    @property
    def active(self) -> bool:
        """Whether steps are being logged."""
        return self._run is not None

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends one step."""
        if self._run is not None:
            run = self._run
            self._guard("log", lambda: run.log({"step": step, **metrics}))

    def close(self, exit_code: int) -> None:
        """Ends the run; more than once is fine."""
        if self._run is not None:
            run, self._run = self._run, None
            self._guard("finish", lambda: run.finish(exit_code=exit_code))

    def _guard(self, action: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        # The one place that supervises wandb: whatever it raises (errors of its own, of the
        # network, of its helper process), training goes on without it.
        except Exception as error:
            self._run = None
            self._on_event(
                "wandb_failed", {"action": action, "error": f"{type(error).__name__}: {error}"}
            )
            return None


def _start(run_dir: RunDir, config: RunConfig, on_event: EventSink) -> Any:
    import wandb

    mode = config.tracking.wandb
    # Asked here, because init would ask on the terminal, in the middle of the live display.
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode = "offline"
        reason = (
            "no credentials: run `wandb login` or set WANDB_API_KEY; `wandb sync` sends it later"
        )
        on_event("wandb_offline", {"reason": reason})

    run_id = run_dir.facts.get("wandb_id")
    if run_id is None:
        run_id = secrets.token_hex(8)
        run_dir.note(wandb_id=run_id)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or _PROJECT,
        name=config.tracking.name or run_dir.root.name,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=run_dir.root,
        config=redacted(config.model_dump(mode="json")),
        # A git remote, or the command line, can hold a password; standard output is in logs/.
        settings=wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            login_timeout=_LOGIN_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
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
        run_dir.note(wandb_url=run.url)
    return run


def redacted(tree: Any) -> Any:
    """A configuration without values secret by their key's name, and without logins in URLs."""
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
