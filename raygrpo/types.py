"""The first page: the values that flow through a run, in the order in which they arise.

    Prompt -> GroupRequest -> Completion -> Group -> Score -> GroupSummary -> FinishedGroup
           -> PlannedSample -> StepBatch -> Microbatch -> StepResult

A generator answers a `GroupRequest` with a `Group`. A scorer adds one `Score` a completion. The
driver holds the `GroupSummary` and a reference to the group's tokens, never the tokens. A
`StepBatch` says what the learner trains in one step; each rank makes its `Microbatch`es of it.

Every type is frozen and complete when made. Array fields name their shape: [P] a prompt's tokens,
[C] a completion's, [G] a group's completions, [B, T] rows and positions. Nothing here knows Ray,
torch or transformers, so that every value can be made in a test and pickled anywhere.
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
    """A version of the policy's weights; ordered. Example: Version(incarnation=1, step=40).

    ``incarnation`` counts the learner's starts. ``step`` counts the StepBatches trained.
    """

    incarnation: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt. Example: Prompt(id="row-7", text="2 + 2 =", token_ids=[17, 10, 17, 28], columns=
    {"answer": "4"}).

    The policy reads ``token_ids`` [P]. They come from ``text`` or from ``messages``: exactly one of
    the two is set. Rewards read ``columns``, the row of the dataset. ``source`` names the part of a
    mixture that the row is from; empty without a mixture.
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
    """How completions are drawn. Example: Sampling(num_completions=8, max_tokens=256, top_p=0.9).

    ``temperature`` 0 is greedy, with logprobs 0. ``top_k`` 0 is off.
    """

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

    Example: GroupRequest(stream="train", group_id=12, prompt=prompt, seed=0, sampling=sampling,
    min_version=Version(1, 3)).

    ``group_id`` is the order of admission in the ``stream``. The random numbers of a completion are
    a function of ``seed``, ``stream`` and ``group_id``; ``attempt`` counts how often the group was
    sent again. A generator serves the request once it holds ``min_version`` or a newer version.
    ``partials`` (none, or one a completion) were written by a generator that left: those with
    finish ``abort`` are continued, the others are done.
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

    Example: Completion(token_ids=[19, 2], logprobs=[-0.3, -0.1], loss_mask=[True, True], text="4",
    finish="stop", version_runs=((Version(1, 3), 2),)).

    ``logprobs`` [C] are in nats, of the distribution that was sampled from (temperature, top-p and
    the like included). ``loss_mask`` [C] is False on tokens that the policy did not write.
    ``version_runs`` are pairs (version, count): which version wrote how many tokens, in order; the
    counts add up to C.
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
        """The oldest version that wrote one of the tokens."""
        return min(version for version, _ in self.version_runs)

    @property
    def newest(self) -> Version:
        """The newest version that wrote one of the tokens."""
        return max(version for version, _ in self.version_runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A generated group: the unit of generation, retry, advantage and staleness.

    Example: Group(request=request, completions=(first, second), generate_s=0.8).
    """

    request: GroupRequest
    completions: tuple[Completion, ...]
    generate_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.completions) != self.request.sampling.num_completions:
            raise ValueError(f"group {self.request.group_id} has the wrong number of completions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A completion's reward: the weighted sum of its parts.

    Example: Score(value=1.2, parts={"exact": 1.0, "format": 0.4}), where ``format`` weighs 0.5.

    ``value`` is None where the completion has no reward: every part is None, or ``error`` is set (a
    part raised, missed its deadline, or returned no finite number).
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
    """A scored group without its tokens; tuples have length G.

    Example: GroupSummary(stream="train", group_id=12, attempt=0, prompt_id="row-7",
    prompt_length=4, lengths=(2, 5), num_loss_tokens=(2, 5), finishes=("stop", "length"),
    oldest=(Version(1, 3),) * 2, newest=(Version(1, 3),) * 2, scores=(Score(...), Score(...))).

    ``oldest`` and ``newest`` are the versions that wrote a completion's tokens. ``metrics`` are the
    values that rewards gave to ``log_metric``; ``reward_s`` the seconds of each reward. ``answers``
    are what the completions answer, for evaluations alone: what a reward gave to
    ``log_extra("answer", ...)``, else the shortened text.
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
    """The summary of a group whose completions have these ``scores`` [G]."""
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
    """A scored group as the driver holds it.

    Example: FinishedGroup(summary=summary, payload=ref, teaches=True, extras={"note": ("a", "b")}).

    ``payload`` refers to the `Group` with the tokens. ``teaches`` says whether a trained completion
    has an advantage. ``extras`` are the columns [G] that rewards gave to ``log_extra``;
    ``traceback`` is the first one of a reward that failed. ``fate`` is None until the window, or
    whoever asked for the group, decides it.
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

    Example: PlannedSample(group_id=12, completion_index=1, prompt_length=4, completion_length=5,
    num_loss_tokens=5, advantage=-0.7, loss_weight=0.03).

    A sample is identified by ``group_id``, ``completion_index`` and ``part`` (0 where a completion
    has one part). ``loss_weight`` multiplies the loss of each trained token: it holds the
    denominator of its optimizer update. A ``filler`` has weight 0: it only makes a rank's number of
    microbatches equal to the others'.
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
    """The plan of one step, made from summaries; one StepBatch trained is one new version.

    Example: StepBatch(step=3, minibatches=((sample, other),), payloads={12: ref},
    versions={12: (Version(1, 3), Version(1, 3))}).

    ``step`` counts the steps trained before. Each minibatch is one optimizer update (times
    ``num_iterations``). ``payloads`` are the references to the `Group`s by group id, ``versions``
    their (oldest, newest). Without ``has_signal`` no group teaches.
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
class Microbatch:
    """Rows that a rank computes at once. Index t of every [B, T] array describes token t.

    Example: one row with a prompt of 2 tokens and two completions of 1 and 2 tokens:

        segment_ids  [0, 0, 1, 2, 2]       the prompt is segment 0
        parent_ids   [-1, -1, 0, 0, 0]     both completions continue the prompt
        positions    [0, 1, 2, 2, 3]
        predictors   [0, 0, 1, 1, 3]       token 3 is predicted at the prompt's end, index 1
        sequence_ids [-1, -1, 0, 1, 1]     which entry of ``advantages`` and ``loss_weights``

    ``segment_ids`` and ``sequence_ids`` are -1 on padding, ``sequence_ids`` on prompts too.
    ``predictors`` is the index whose hidden state predicts token t: t - 1, but the prompt's last
    index for the first token of a completion. ``advantages`` and ``loss_weights`` are [S], one for
    each of the S completions.
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
    """The learner's report of one step, which took ``seconds``.

    Example: StepResult(version=Version(1, 4), stats={"loss": Stat.of(0.02)}, seconds=3.1).
    """

    version: Version
    stats: Mapping[str, Stat]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A statistic that can be merged: sums and counts are added.

    Example: of the values 1 and 3, Stat(sum=4, count=2, min=1, max=3).
    """

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
    """Adds up statistics by name; a part may lack a name."""
    merged: dict[str, Stat] = {}
    for part in parts:
        for name, stat in part.items():
            merged[name] = merged[name] + stat if name in merged else stat
    return merged
