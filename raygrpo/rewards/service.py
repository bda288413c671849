"""Rewards that services give over HTTP: deadlines, retries, and errors that name the service.

The built-in reward `http` asks a service of your own. Request: ``{"prompts": [...],
"completions": [...], "columns": {name: [...]}}``. Answer: ``{"rewards": [number | null, ...],
"metrics": {name: number}}``, ``metrics`` optional.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, TypeVar

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from raygrpo.errors import RewardError
from raygrpo.rewards.contract import Setup
from raygrpo.rewards.params import HttpParams, ServiceParams

T = TypeVar("T")
P = TypeVar("P", bound=ServiceParams)
LogMetric = Callable[[str, float], None]
Items = Sequence[Any]
Columns = Mapping[str, Sequence[Any]]

# The share of a reward's deadline within which all requests end, so that the error names the
# service's last failure. Past the whole deadline the process would be ended with less to say.
BUDGET_FRAC = 0.85
MAX_QUOTED_CHARS = 120
_BACKOFF = wait_random_exponential(multiplier=0.25, max=20.0)


class ServiceError(Exception):
    """A service refused a request, or its answer cannot be used."""


class _Passing(ServiceError):
    """A failure that may pass; ``wait_s`` is the time that the service asked to wait."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class ServiceReward(Generic[P]):
    """A reward that a service gives, asked on one event loop; `_score` makes the requests.

    ``headers`` are sent with every request. The requests of a group end within its deadline,
    ``setup.timeout_s``.
    """

    def __init__(self, params: P, headers: Mapping[str, str], setup: Setup) -> None:
        self._params = params
        self._name = setup.name
        self._headers = {"Content-Type": "application/json", **headers}
        self._budget_s = BUDGET_FRAC * setup.timeout_s
        self._client: httpx.AsyncClient | None = None
        self._deadline = 0.0
        self._num_retries = 0

    async def __call__(
        self,
        prompts: Items,
        completions: Items,
        completion_ids: Items,
        trainer_state: Any,
        log_extra: Callable[..., None],
        log_metric: LogMetric,
        **columns: Items,
    ) -> list[Any]:
        self._deadline = time.monotonic() + self._budget_s
        self._num_retries = 0
        rewards = await self._score(prompts, completions, columns, log_metric)
        log_metric(f"rewards/{self._name}/retries", self._num_retries)
        return rewards

    async def _score(
        self, prompts: Items, completions: Items, columns: Columns, log_metric: LogMetric
    ) -> list[Any]:
        raise NotImplementedError

    async def _gather(self, calls: list[Coroutine[Any, Any, T]]) -> list[T | ServiceError]:
        """Runs calls, ``concurrency`` at once; a failed call gives its error."""
        limit = asyncio.Semaphore(self._params.concurrency)

        async def run(call: Coroutine[Any, Any, T]) -> T | ServiceError:
            async with limit:
                try:
                    return await call
                except ServiceError as error:
                    return error

        return await asyncio.gather(*(run(call) for call in calls))

    async def _post(self, url: str, body: Mapping[str, Any]) -> Any:
        """The decoded JSON answer of a request; after a failure that may pass it is sent again.

        Raises:
            ServiceError: the answer is refused or unusable, or attempts or time are used up.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._params.retries + 1)
            | stop_before_delay(max(0.0, self._deadline - time.monotonic())),
            wait=_wait,
            retry=retry_if_exception_type(_Passing),
            before_sleep=self._count_retry,
            reraise=True,
        )
        return await retrying(self._post_once, url, body)

    def _count_retry(self, state: RetryCallState) -> None:
        self._num_retries += 1

    async def _post_once(self, url: str, body: Mapping[str, Any]) -> Any:
        content = _encode(url, body)
        left = self._deadline - time.monotonic()
        timeout_s = min(self._params.request_timeout_s, left)
        if timeout_s <= 0:
            raise ServiceError(f"{url}: no time was left for a request")
        if self._client is None:
            self._client = httpx.AsyncClient(headers=self._headers, timeout=None)
        try:
            # httpx's own limits are of inactivity: a service that trickles would never end.
            async with asyncio.timeout(timeout_s):
                response = await self._client.post(url, content=content)
        except TimeoutError:
            raise _Passing(f"{url} gave no answer within {timeout_s:.3g} s") from None
        except httpx.TransportError as error:
            raise _Passing(f"{url}: {type(error).__name__}: {error}") from None
        return _read(url, response)


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
        self, prompts: Items, completions: Items, columns: Columns, log_metric: LogMetric
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
        answers = await self._gather([self._ask(body, log_metric) for body in bodies])
        rewards: list[Any] = []
        for body, answer in zip(bodies, answers, strict=True):
            if isinstance(answer, ServiceError):
                rewards += [answer] * len(body["completions"])
            else:
                rewards += answer
        return rewards

    def _choose(self, columns: Columns) -> Columns:
        wanted = self._params.columns
        if wanted is None:
            return columns
        if missing := [name for name in wanted if name not in columns]:
            raise ValueError(f"the row has no column {', '.join(missing)} to send")
        return {name: columns[name] for name in wanted}

    async def _ask(self, body: Mapping[str, Any], log_metric: LogMetric) -> list[Any]:
        url, size = self._params.url, len(body["completions"])
        answer = await self._post(url, body)
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


def _encode(url: str, body: Mapping[str, Any]) -> bytes:
    # As ASCII: a completion may hold half a surrogate pair, which UTF-8 cannot carry.
    try:
        return json.dumps(body, allow_nan=False, default=_plain).encode()
    except ValueError as error:
        raise ServiceError(f"{url} cannot be sent the row as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """A JSON value in place of one that JSON does not have: lists for arrays, else text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _read(url: str, response: httpx.Response) -> Any:
    status = response.status_code
    if status == httpx.codes.TOO_MANY_REQUESTS or status >= 500:
        raise _Passing(_describe(url, response), _retry_after_s(response))
    if not response.is_success:
        raise ServiceError(_describe(url, response))
    try:
        return response.json()
    except ValueError:
        raise ServiceError(f"{url} answered no JSON: {quoted(response.text)}") from None


def _describe(url: str, response: httpx.Response) -> str:
    return f"{url} answered {response.status_code}: {quoted(response.text)}"


def quoted(value: Any) -> str:
    """A value shortened for an error message."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "..."


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that the service asks to wait (RFC 9110, 10.2.3): a number or a date; 0 if none."""
    value = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.wait_s if isinstance(error, _Passing) else 0.0
    return asked + _BACKOFF(state)


def secret(variable: str) -> str:
    """The value of an environment variable that a configuration names.

    Raises:
        RewardError: the variable is not set where the reward runs, or no header can hold its text.
    """
    # A file that a secret came from ends in a newline; the library's error would quote the secret.
    value = os.environ.get(variable, "").strip()
    if not value:
        raise RewardError(
            f"the environment variable {variable} is not set",
            "set it where the scorers run (before ray start on a cluster)",
        )
    if not (value.isascii() and value.isprintable()):
        raise RewardError(
            f"the environment variable {variable} holds characters that no HTTP header can",
            "set it to printable ASCII text",
        )
    return value
