"""A cache of rewards: a reward scores equal completions of a row once."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raygrpo.rewards.contract import Call, Reply, RewardBackend

CAPACITY = 100_000
# A value whose extras are larger is not kept, so that the cache's memory is bounded, too.
MAX_EXTRA_CHARS = 1_000


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a reward made of one completion."""

    part: float | None
    error: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


class CachedReward:
    """A reward with a cache by (prompt, columns, completion), for deterministic functions.

    Of equal completions in a group, one is sent. Failed values are not kept. The metric
    ``rewards/{name}/cache_hit_frac`` is the share of completions that were not sent.
    """

    def __init__(self, inner: RewardBackend, capacity: int = CAPACITY) -> None:
        self.name = inner.name
        self._inner = inner
        self._capacity = capacity
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def start(self) -> None:
        """Starts the cached reward."""
        self._inner.start()

    def close(self) -> None:
        """Ends the cached reward."""
        self._inner.close()

    def call(self, call: Call) -> Reply:
        """Scores the completions that are not in the cache; the reply is of the whole group."""
        keys = completion_keys(call)
        known = {key: self._entries[key] for key in keys if key in self._entries}
        wanted: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key in known:
                self._entries.move_to_end(key)
            else:
                wanted.setdefault(key, index)
        reply = Reply(parts=(), errors=())
        if wanted:
            texts = [call.completions[index] for index in wanted.values()]
            ids = [call.completion_ids[index] for index in wanted.values()]
            reply = self._inner.call(replace(call, completions=texts, completion_ids=ids))
        fresh = {key: _entry(reply, place) for place, key in enumerate(wanted)}
        self._keep(fresh)
        known |= fresh
        entries = [known[key] for key in keys]
        columns = sorted({column for entry in entries for column in entry.extras})
        hit_frac = 1 - len(wanted) / len(keys)
        return replace(
            reply,
            parts=tuple(entry.part for entry in entries),
            errors=tuple(entry.error for entry in entries),
            metrics={**reply.metrics, f"rewards/{self.name}/cache_hit_frac": (hit_frac,)},
            extras={name: tuple(entry.extras.get(name) for entry in entries) for name in columns},
        )

    def _keep(self, fresh: Mapping[bytes, _Entry]) -> None:
        self._entries.update((key, entry) for key, entry in fresh.items() if _is_kept(entry))
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)


def completion_keys(call: Call) -> list[bytes]:
    """A 128-bit key of each completion and its row: text, tokens, prompt and columns."""
    row = hashlib.blake2b(_encoded([call.prompt, call.columns]), digest_size=16)
    keys = []
    for completion, ids in zip(call.completions, call.completion_ids, strict=True):
        key = row.copy()
        key.update(_encoded([completion, ids]))
        keys.append(key.digest())
    return keys


def _encoded(value: Any) -> bytes:
    # JSON where it can be: a pickle of equal values differs with what they share.
    try:
        return json.dumps(value, default=lambda other: pickle.dumps(other).hex()).encode()
    except (TypeError, ValueError, RecursionError):
        return pickle.dumps(value)


def _entry(reply: Reply, place: int) -> _Entry:
    extras = {name: values[place] for name, values in reply.extras.items()}
    return _Entry(reply.parts[place], reply.errors[place], extras)


def _is_kept(entry: _Entry) -> bool:
    chars = sum(len(value) for value in entry.extras.values() if isinstance(value, str))
    return entry.error is None and chars <= MAX_EXTRA_CHARS
