"""The built-in reward `http`: a service of your own that scores completions.

Request: ``{"prompts": [...], "completions": [...], "columns": {name: [...]}}``. Answer:
``{"rewards": [number | null, ...], "metrics": {name: number}}``, ``metrics`` optional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raygrpo.rewards.contract import Setup
from raygrpo.rewards.params import HttpParams
from raygrpo.rewards.service import Service, ServiceError, quoted, secret


class HttpReward:
    """Scores a group by requests of ``batch_size`` completions.

    A request that fails for good errors its completions; the group's others keep their rewards.

    Raises:
        RewardError: an environment variable of ``headers_env`` is not set.
    """

    def __init__(self, params: HttpParams, setup: Setup) -> None:
        headers = {header: secret(name) for header, name in params.headers_env.items()}
        self._params = params
        self._name = setup.name
        self._service = Service(params, headers, setup.timeout_s)

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        trainer_state: Any,
        log_extra: Callable[..., None],
        log_metric: Callable[[str, float], None],
        **columns: Sequence[Any],
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
        log_metric(f"rewards/{self._name}/retries", self._service.num_retries)
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

    async def _ask(
        self, body: Mapping[str, Any], log_metric: Callable[[str, float], None]
    ) -> list[Any]:
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
