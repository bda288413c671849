"""The types that flow through a run: prompt -> completion -> score -> group -> sample -> step.

Every type is frozen and complete when made. Per-token arrays of one thing have one length, which
``__post_init__`` checks. Nothing here knows Ray, torch or transformers: references to objects that
live elsewhere are opaque (`Any`), so that the types can be tested and pickled anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
Message = Mapping[str, Any]
Stream = Literal["train", "eval"]
Finish = Literal["stop", "length", "abort"]
Fate = Literal["kept", "no_signal", "errored", "generated", "eval"]
Ref = Any  # a reference to an object that lives elsewhere; only `actors/` looks inside


class Version(NamedTuple):
    """A version of the policy's weights; ordered.

    ``incarnation`` counts learner starts (a restarted learner takes the next one); ``step`` is the
    number of StepBatches trained.
    """

    incarnation: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: what the policy reads, and the dataset row that rewards read.

    Exactly one of ``text`` and ``messages`` is set; ``token_ids`` [P] is what the policy sees.
    ``source`` names its part of a mixture; empty without one.
    """

    id: str
    token_ids: IntArray
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError(f"prompt {self.id}: set exactly one of text and messages")
        if self.token_ids.ndim != 1 or self.token_ids.size == 0:
            raise ValueError(f"prompt {self.id}: token_ids must be a non-empty [P] array")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. ``temperature`` 0 is greedy (logprob 0); ``top_k`` 0 is off."""

    num_completions: int
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_completions < 1 or self.max_tokens < 1:
            raise ValueError("num_completions and max_tokens must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError("min_tokens must lie between 0 and max_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """An order for one group: ``sampling.num_completions`` completions of one prompt.

    ``group_id`` is the order of admission in its stream and, with ``seed`` and ``stream``, the key
    of all randomness; ``attempt`` only tells duplicates apart. A generator serves the request once
    it holds ``min_version`` or a newer one. ``partials`` (none, or one a completion) are what
    another generator wrote before it was aborted: those that finished ``abort`` go on from their
    tokens, the others are done.
    """

    stream: Stream
    group_id: int
    prompt: Prompt
    seed: int
    sampling: Sampling
    min_version: Version
    attempt: int = 0
    partials: tuple[Completion, ...] = ()

    def __post_init__(self) -> None:
        if self.partials and len(self.partials) != self.sampling.num_completions:
            raise ValueError(f"group {self.group_id} has the wrong number of partial completions")

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Indices of the completions that are still to be written."""
        ended = {i for i, partial in enumerate(self.partials) if partial.finish != "abort"}
        return tuple(i for i in range(self.sampling.num_completions) if i not in ended)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion of C tokens.

    ``logprobs`` [C] are in nats, of the distribution really sampled from (temperature, top-p and
    the like included). ``loss_mask`` [C] is False on tokens the policy did not write.
    ``version_runs`` is the weights' version of each token, run-length coded as (version, count)
    pairs in order; the counts add up to C.
    """

    token_ids: IntArray
    logprobs: FloatArray
    loss_mask: BoolArray
    text: str
    finish: Finish
    version_runs: tuple[tuple[Version, int], ...]

    def __post_init__(self) -> None:
        length = self.token_ids.size
        if self.logprobs.size != length or self.loss_mask.size != length:
            raise ValueError("token_ids, logprobs and loss_mask of a completion differ in length")
        if not self.version_runs or sum(count for _, count in self.version_runs) != length:
            raise ValueError("version_runs must cover the completion's tokens exactly")

    @property
    def oldest(self) -> Version:
        """The oldest version that wrote a token."""
        return min(version for version, _ in self.version_runs)

    @property
    def newest(self) -> Version:
        """The newest version that wrote a token."""
        return max(version for version, _ in self.version_runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A generated group: the unit of generation, retry, advantage and staleness (the payload)."""

    request: GroupRequest
    completions: tuple[Completion, ...]
    generate_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.completions) != self.request.sampling.num_completions:
            raise ValueError(f"group {self.request.group_id} has the wrong number of completions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A completion's reward: the weighted sum of its parts.

    ``value`` is None when the completion has no reward: every part None, or ``error`` set (a part
    raised, timed out, or returned something that is no finite number).
    """

    value: float | None
    parts: Mapping[str, float | None]
    error: str | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a score must be finite, not {self.value}")
        if self.error is not None and self.value is not None:
            raise ValueError("an errored score has no value")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """What the driver knows of a finished group: everything but its tokens. Tuples have length G.

    ``metrics`` are the values that reward functions reported by ``log_metric``; ``reward_s`` the
    seconds of each reward; ``answers`` [G] what each completion answers, where a reward said it
    (``log_extra("answer", ...)``), else its whole text, shortened; empty in training.
    """

    stream: Stream
    group_id: int
    attempt: int
    prompt_id: str
    prompt_length: int
    lengths: tuple[int, ...]
    num_loss_tokens: tuple[int, ...]
    finishes: tuple[Finish, ...]
    oldest: tuple[Version, ...]
    newest: tuple[Version, ...]
    scores: tuple[Score, ...]
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    generate_s: float = 0.0
    score_s: float = 0.0
    reward_s: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.num_loss_tokens, self.finishes, self.oldest, self.newest, self.scores)
        if any(len(column) != len(self.lengths) for column in columns):
            raise ValueError(f"group {self.group_id}: summary columns differ in length")


def summarise(
    group: Group,
    scores: Sequence[Score],
    *,
    metrics: Mapping[str, tuple[float, ...]] | None = None,
    score_s: float = 0.0,
    reward_s: Mapping[str, float] | None = None,
    answers: tuple[str, ...] = (),
) -> GroupSummary:
    """What the driver is told of a group whose completions have these ``scores`` [G]."""
    request, completions = group.request, group.completions
    return GroupSummary(
        stream=request.stream,
        group_id=request.group_id,
        attempt=request.attempt,
        prompt_id=request.prompt.id,
        prompt_length=request.prompt.token_ids.size,
        lengths=tuple(completion.token_ids.size for completion in completions),
        num_loss_tokens=tuple(int(completion.loss_mask.sum()) for completion in completions),
        finishes=tuple(completion.finish for completion in completions),
        oldest=tuple(completion.oldest for completion in completions),
        newest=tuple(completion.newest for completion in completions),
        scores=tuple(scores),
        metrics=metrics or {},
        generate_s=group.generate_s,
        score_s=score_s,
        reward_s=reward_s or {},
        source=request.prompt.source,
        answers=answers,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """A scored group as the driver holds it; ``payload`` refers to the `Group` with its tokens.

    ``teaches``: whether a trained completion has an advantage. ``extras`` are the columns [G] that
    rewards gave to ``log_extra``, ``traceback`` the first one of a reward that failed. ``fate`` is
    None until it is decided.
    """

    summary: GroupSummary
    payload: Ref
    teaches: bool
    extras: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    traceback: str | None = None
    fate: Fate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSample:
    """One completion's place in a step, without its tokens.

    A sample is identified by ``group_id``, ``completion_index`` and ``part`` (0 for a completion of
    one part). ``loss_weight`` multiplies each trained token's loss and carries the aggregation's
    global denominator. ``filler`` marks a sample that only keeps a rank's microbatch count equal to
    the others': it is computed with weight 0.
    """

    group_id: int
    completion_index: int
    part: int = 0
    prompt_length: int
    completion_length: int
    num_loss_tokens: int
    advantage: float
    loss_weight: float
    filler: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The plan of one step, made from summaries: one StepBatch trained = one new version.

    ``minibatches``: one optimizer update each (times ``num_iterations``). ``payloads`` maps a group
    id to an opaque reference to its `Group`. ``versions`` maps it to (oldest, newest).
    """

    step: int
    minibatches: tuple[tuple[PlannedSample, ...], ...]
    payloads: Mapping[int, Ref]
    versions: Mapping[int, tuple[Version, Version]]
    has_signal: bool = True

    def __post_init__(self) -> None:
        groups = {sample.group_id for batch in self.minibatches for sample in batch}
        if missing := groups - set(self.payloads):
            raise ValueError(f"step {self.step}: no payload for groups {sorted(missing)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion with its prompt, ready to train on; per-token arrays are [L], L = P + C.

    ``loss_mask`` is True where trained (never on the prompt); ``sampler_logprobs`` is 0 elsewhere.
    """

    plan: PlannedSample
    token_ids: IntArray
    loss_mask: BoolArray
    sampler_logprobs: FloatArray

    def __post_init__(self) -> None:
        length = self.plan.prompt_length + self.plan.completion_length
        arrays = (self.token_ids, self.loss_mask, self.sampler_logprobs)
        if any(array.shape != (length,) for array in arrays):
            raise ValueError(f"sample {self.plan}: arrays must have length {length}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Rows that a rank computes at once. Index t of every per-token array describes token t.

    Per token [B, T]: ``token_ids``; ``positions`` (rotary position); ``segment_ids`` (row-local,
    -1 on padding); ``parent_ids`` (the segment that this token's segment continues, -1 for none: a
    completion that shares its prompt with others names the prompt's segment); ``predictors`` (the
    index whose hidden state predicts token t: t - 1, or the prompt's last index for the first token
    of a completion); ``loss_mask``; ``sampler_logprobs``; ``sequence_ids`` (index into the
    per-sequence arrays, -1 where a token belongs to no completion).
    Per sequence [S]: ``advantages`` and ``loss_weights``.
    """

    token_ids: IntArray
    positions: IntArray
    segment_ids: IntArray
    parent_ids: IntArray
    predictors: IntArray
    loss_mask: BoolArray
    sampler_logprobs: FloatArray
    sequence_ids: IntArray
    advantages: FloatArray
    loss_weights: FloatArray

    def __post_init__(self) -> None:
        arrays = (self.positions, self.segment_ids, self.parent_ids, self.predictors)
        shapes = [array.shape for array in (*arrays, self.sequence_ids, self.loss_mask)]
        shapes.append(self.sampler_logprobs.shape)
        if any(shape != self.token_ids.shape for shape in shapes):
            raise ValueError("per-token arrays of a microbatch differ in shape")
        if self.advantages.shape != self.loss_weights.shape:
            raise ValueError("per-sequence arrays of a microbatch differ in shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the learner reports of one step, which took ``seconds``."""

    version: Version
    stats: Mapping[str, Stat]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A mergeable statistic: merging is addition of sums and counts, and min and max."""

    sum: float
    count: float
    min: float
    max: float

    @property
    def mean(self) -> float:
        """Sum over count; NaN when nothing was counted."""
        return self.sum / self.count if self.count else math.nan

    def __add__(self, other: Stat) -> Stat:
        return Stat(
            sum=self.sum + other.sum,
            count=self.count + other.count,
            min=min(self.min, other.min),
            max=max(self.max, other.max),
        )

    @staticmethod
    def of(value: float, count: float = 1.0) -> Stat:
        """A statistic of ``count`` equal values."""
        return Stat(sum=value * count, count=count, min=value, max=value)


def merge_stats(parts: list[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Adds up statistics by name; a name that is missing in a part adds nothing."""
    merged: dict[str, Stat] = {}
    for part in parts:
        for name, stat in part.items():
            merged[name] = merged[name] + stat if name in merged else stat
    return merged
