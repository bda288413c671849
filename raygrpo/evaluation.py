"""One evaluation: the same prompts with the same randomness each time, on one version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raygrpo.config import RunConfig
from raygrpo.types import GroupRequest, GroupSummary, Prompt, Version


class Evaluation:
    """The groups of an evaluation until all have come back."""

    def __init__(self, prompts: Sequence[Prompt], version: Version, config: RunConfig) -> None:
        drawn = config.sampling.settings()
        sizes = {True: 1, False: config.eval.num_completions}
        self.step = version.step
        # Ids are even for greedy groups, odd for sampled ones: each keeps its random numbers.
        self._requests = {
            2 * index + (not greedy): GroupRequest(
                stream="eval",
                group_id=2 * index + (not greedy),
                attempt=0,
                prompt=prompt,
                seed=config.seed,
                sampling=replace(
                    drawn,
                    num_completions=size,
                    temperature=0.0 if greedy else drawn.temperature,
                ),
                min_version=version,
            )
            for index, prompt in enumerate(prompts)
            for greedy, size in sizes.items()
            if size
        }
        self._finished: dict[int, GroupSummary] = {}
        self._num_dropped = 0

    @property
    def requests(self) -> list[GroupRequest]:
        """What is to be sent."""
        return list(self._requests.values())

    @property
    def done(self) -> bool:
        """Whether every group came back or was given up."""
        return len(self._finished) + self._num_dropped == len(self._requests)

    def finish(self, summary: GroupSummary) -> None:
        """Takes a finished group."""
        self._finished[summary.group_id] = summary

    def drop(self, group_id: int) -> None:
        """Gives up a group; it is counted in ``eval/num_dropped``."""
        if group_id in self._requests and group_id not in self._finished:
            self._num_dropped += 1

    def requeue(self, group_id: int) -> GroupRequest:
        """The request to send again after its worker was lost."""
        request = self._requests[group_id]
        self._requests[group_id] = replace(request, attempt=request.attempt + 1)
        return self._requests[group_id]

    def metrics(self) -> dict[str, float]:
        """Means over all scored completions; what failed is counted, not scored 0."""
        greedy = self._metrics("eval/greedy/", [0])
        return self._metrics("eval/", [1]) | greedy | {"eval/num_dropped": float(self._num_dropped)}

    def _metrics(self, prefix: str, parity: list[int]) -> dict[str, float]:
        summaries = [self._finished[i] for i in sorted(self._finished) if i % 2 in parity]
        if not summaries:
            return {}
        scores = [score for summary in summaries for score in summary.scores]
        lengths = [length for summary in summaries for length in summary.lengths]
        metrics = {
            f"{prefix}num_completions": float(len(scores)),
            f"{prefix}num_errored": float(sum(score.error is not None for score in scores)),
        }
        if lengths:
            metrics[f"{prefix}completions/mean_length"] = sum(lengths) / len(lengths)
        values = [score.value for score in scores if score.value is not None]
        if values:
            metrics[f"{prefix}reward"] = sum(values) / len(values)
        for name in sorted({name for score in scores for name in score.parts}):
            parts = [part for score in scores if (part := score.parts.get(name)) is not None]
            if parts:
                metrics[f"{prefix}rewards/{name}/mean"] = sum(parts) / len(parts)
        return metrics
