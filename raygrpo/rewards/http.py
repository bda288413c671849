"""The built-in reward `http`: a service of your own that scores completions.

Request: ``{"prompts": [...], "completions": [...], "columns": {name: [...]}}``. Answer:
``{"rewards": [number | null, ...], "metrics": {name: number}}``, ``metrics`` optional.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raygrpo.rewards.contract import Setup
from raygrpo.rewards.params import HttpParams
from raygrpo.rewards.service import LogMetric, ServiceError, ServiceReward, quoted, secret


class HttpReward(ServiceReward[HttpParams]):
    """Scores a group by requests of ``batch_size`` completions.

    A request that fails for good errors its completions; the other completions keep their rewards.

    Raises:
        RewardError: an environment variable of ``headers_env`` is not set.
    """

    def __init__(self, params: HttpParams, setup: Setup) -> None:
        headers = {header: secret(name) for header, name in params.headers_env.items()}
        super().__init__(params, headers, setup)

    async def _score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        log_metric: LogMetric,
    ) -> list[Any]:
        chosen = self._choose(columns)
        size = self._params.batch_size or len(completions)
        parts = [slice(start, start + size) for start in range(0, len(completions), size)]
        bodies = [
            {
                "prompts": list(prompts[part]),
                "completions": list(completions[part]),
                "columns": {name: list(values[part]) for name, values in chosen.items()},
            }
            for part in parts
        ]
        answers = await self._service.gather([self._ask(body, log_metric) for body in bodies])
        rewards: list[Any] = []
        for body, answer in zip(bodies, answers, strict=True):
            if isinstance(answer, ServiceError):
                rewards += [answer] * len(body["completions"])
            else:
                rewards += answer
        return rewards

    def _choose(self, columns: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        wanted = self._params.columns
        if wanted is None:
            return columns
        if missing := [name for name in wanted if name not in columns]:
            raise ValueError(f"the row has no column {', '.join(missing)} to send")
        return {name: columns[name] for name in wanted}

    async def _ask(self, body: Mapping[str, Any], log_metric: LogMetric) -> list[Any]:
        url, size = self._params.url, len(body["completions"])
        answer = await self._service.post(url, body)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise ServiceError(f'{url} answered no {{"rewards": [...]}}: {quoted(answer)}')
        if len(rewards) != size:
            raise ServiceError(f"{url} answered {len(rewards)} rewards for {size} completions")
        metrics = answer.get("metrics") or {}
        if not isinstance(metrics, dict) or not all(map(_is_finite, metrics.values())):
            raise ServiceError(f"{url} answered metrics that are no numbers: {quoted(metrics)}")
        for name, value in metrics.items():
            log_metric(name, value)
        return rewards


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
