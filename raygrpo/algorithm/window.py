"""The window: which groups may start, which are kept, and which groups a step consists of.

Pure bookkeeping: no clock, no IO, no processes. Three rules bound the age of the tokens:

1. A group may start iff ``admitted - dropped < min(step + 1 + max_staleness, steps) *
   groups_per_step``.
2. Steps take groups in order of admission.
3. A generator serves a request only with weights at least as new as the request's
   ``min_version``, the version of the step at which the group was admitted.

Then no token of a trained group is older than ``max_staleness`` versions. Proof: when a group is
admitted at step s, at most ``admitted - dropped`` groups are kept before it. By rule 1 they fill
fewer than s + 1 + max_staleness steps. By rule 2 the group is taken at step s + max_staleness at
the latest. By rule 3 its tokens are of version s or newer.

Example: with 4 groups a step and a ``max_staleness`` of 1, groups 0 to 7 may start at step 0. Group
8 may start once step 0 is trained, or once one of the groups is dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from raygrpo.config import RunConfig
from raygrpo.types import Fate, FinishedGroup, GroupRequest, Prompt, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowState:
    """A window between two steps. ``pending`` requests were admitted and not yet trained.

    Example: after two steps of 4 groups, one of them dropped: WindowState(admitted=13, dropped=1,
    taken=8, refilled=0, pending=(request_9, request_10, request_11, request_12)).
    """

    admitted: int
    dropped: int
    taken: int
    refilled: int
    pending: tuple[GroupRequest, ...]

    def has_decided(self, group_id: int) -> bool:
        """Whether a group was trained or dropped before."""
        waiting = any(request.group_id == group_id for request in self.pending)
        return group_id < self.admitted and not waiting


def train_request(
    config: RunConfig, group_id: int, prompt: Prompt, min_version: Version
) -> GroupRequest:
    """The order for a run's training group ``group_id``."""
    return GroupRequest(
        stream="train",
        group_id=group_id,
        prompt=prompt,
        seed=config.seed,
        sampling=config.sampling.settings(),
        min_version=min_version,
    )


class Window:
    """Admits groups, decides their fates in order of admission, and hands out steps.

    A group waits here for the groups before it, then for the rest of its step. A group that teaches
    nothing frees its place, at most ``max_refills`` times for one step; further such groups keep
    their places. A group whose scores failed always frees its place.
    """

    def __init__(
        self,
        *,
        steps: int,
        groups_per_step: int,
        max_staleness: int = 0,
        max_refills: int = 0,
        state: WindowState | None = None,
    ) -> None:
        self._steps = steps
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._max_refills = max_refills
        state = state or WindowState(admitted=0, dropped=0, taken=0, refilled=0, pending=())
        self._admitted = state.admitted
        self._dropped = state.dropped
        self._taken = state.taken
        self._refilled = state.refilled
        self._undecided: deque[int] = deque(request.group_id for request in state.pending)
        self._requests = {request.group_id: request for request in state.pending}
        self._finished: dict[int, FinishedGroup] = {}
        self._kept: deque[FinishedGroup] = deque()

    @property
    def admitted(self) -> int:
        """Groups admitted so far; the next one's id."""
        return self._admitted

    @property
    def pending(self) -> tuple[GroupRequest, ...]:
        """Requests admitted and not yet trained or dropped, in order of admission."""
        return tuple(self._requests[group_id] for group_id in sorted(self._requests))

    @property
    def buffered(self) -> tuple[FinishedGroup, ...]:
        """Finished groups that wait for their step, or for an earlier group's end."""
        return (*self._kept, *self._finished.values())

    def awaits(self, group_id: int) -> bool:
        """Whether a group was admitted and is not yet trained or dropped."""
        return group_id in self._requests

    def has_room(self, step: int) -> bool:
        """Whether another group may start when ``step`` StepBatches are trained."""
        reach = min(step + 1 + self._max_staleness, self._steps)
        return self._admitted - self._dropped < reach * self._groups_per_step

    def admit(self, request: GroupRequest) -> GroupRequest:
        """Takes the next request, whose id must be ``admitted``."""
        if request.group_id != self._admitted:
            raise ValueError(f"group {request.group_id} admitted out of order")
        self._admitted += 1
        self._undecided.append(request.group_id)
        self._requests[request.group_id] = request
        return request

    def finish(self, group: FinishedGroup) -> list[FinishedGroup]:
        """Takes a finished group; returns the groups, with their fates, that this decides.

        They are in order of admission. A duplicate (its id is finished already) decides nothing.
        """
        group_id = group.summary.group_id
        if group_id not in self._requests or group_id in self._finished:
            return []
        if group_id not in self._undecided:
            return []
        self._finished[group_id] = group
        return self._decide_heads()

    def fail(self, group_id: int) -> list[FinishedGroup]:
        """Gives up a group that cannot be generated, which frees its place; returns as `finish`."""
        if group_id not in self._undecided or group_id in self._finished:
            return []
        self._undecided.remove(group_id)
        del self._requests[group_id]
        self._dropped += 1
        return self._decide_heads()

    def _decide_heads(self) -> list[FinishedGroup]:
        decided = []
        while self._undecided and self._undecided[0] in self._finished:
            group = self._finished.pop(self._undecided.popleft())
            group = replace(group, fate=self._decide(group))
            if group.fate == "kept":
                self._keep(group)
            else:
                self._dropped += 1
                del self._requests[group.summary.group_id]
            decided.append(group)
        return decided

    def step_ready(self) -> bool:
        """Whether a whole step can be taken."""
        return len(self._kept) >= self._groups_per_step

    def take_step(self) -> list[FinishedGroup]:
        """The next step's groups, in order of admission.

        Raises:
            ValueError: no whole step is ready.
        """
        if not self.step_ready():
            raise ValueError("no step is ready")
        groups = [self._kept.popleft() for _ in range(self._groups_per_step)]
        for group in groups:
            del self._requests[group.summary.group_id]
        self._taken += len(groups)
        return groups

    def state(self) -> WindowState:
        """The state that a resumed run needs: it generates the pending groups again."""
        return WindowState(
            admitted=self._admitted,
            dropped=self._dropped,
            taken=self._taken,
            refilled=self._refills_of_resumed_step(),
            pending=self.pending,
        )

    def _refills_of_resumed_step(self) -> int:
        # A resumed run decides kept groups that wait here again, from the first open step on. Only
        # where none waits do the drops so far count for that step.
        return 0 if self._kept else self._refilled

    def _decide(self, group: FinishedGroup) -> Fate:
        scores = group.summary.scores
        failed = any(score.error for score in scores)
        if failed and sum(score.value is not None for score in scores) < 2:
            return "errored"
        if not group.teaches and self._refilled < self._max_refills:
            self._refilled += 1
            return "no_signal"
        return "kept"

    def _keep(self, group: FinishedGroup) -> None:
        self._kept.append(group)
        if (self._taken + len(self._kept)) % self._groups_per_step == 0:
            self._refilled = 0
