"""Several sources in one stream, by weight."""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from raygrpo.config import DataSection
from raygrpo.data.prompts import STREAM_KEYS, PromptStream
from raygrpo.data.sources import BUILDERS
from raygrpo.errors import ConfigError, DataError, RayGrpoError
from raygrpo.types import GroupSummary, Prompt, Stream

# 2**64 over the golden ratio: its multiples fall evenly on the circle of 2**64 numbers, and over
# any run of n of them an arc's share is met within O(log n) draws.
_CIRCLE, _STRIDE = 2**64, 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a mixture: ``section`` has no parts of its own."""

    name: str
    weight: float
    section: DataSection


def mixture_parts(section: DataSection) -> list[Part]:
    """The parts of a section: itself with weight 1, then those of ``section.mixture``.

    Raises:
        ConfigError: two parts have one name.
    """
    alone = section.model_copy(update={"mixture": []})
    parts = [Part(name=_short_name(section.source), weight=1.0, section=alone)]
    for index, entry in enumerate(section.mixture):
        own = alone.changed(entry)
        name = entry.name or _short_name(own.source)
        if name in [part.name for part in parts]:
            raise ConfigError(
                f"data.mixture[{index}].name: another part is called {name!r}",
                "give it a name of its own",
            )
        parts.append(Part(name=name, weight=entry.weight, section=own))
    return parts


def _short_name(source: str) -> str:
    if Path(source).suffix in BUILDERS:
        return Path(source).stem
    return source.rpartition("/")[2].rpartition(":")[2]


class Mixture:
    """Draws from each part with the probability of its weight; each part has its own epochs.

    Each part has an arc of a circle, as long as its weight. Draw k takes the part whose arc holds
    the point ``phase + k * stride``; the phase is a function of (seed, stream). A single draw has
    the parts' probabilities. In n draws, each part's number of draws is within O(log n) of its
    share, closer than with independent draws. A prompt's ``source`` is its part's name, and its
    ``id`` begins with it.
    """

    def __init__(
        self,
        parts: Mapping[str, PromptStream],
        weights: Sequence[float],
        *,
        seed: int,
        stream: Stream = "train",
    ) -> None:
        self._parts, self._names = dict(parts), list(parts)
        total = math.fsum(weights)
        # The last arc ends with the circle.
        self._ends = [round(end / total * _CIRCLE) for end in accumulate(weights)][:-1]
        generator = np.random.default_rng((seed, STREAM_KEYS[stream]))
        self._phase = int(generator.integers(_CIRCLE, dtype=np.uint64, endpoint=False))
        self._position = 0

    @property
    def num_dropped(self) -> int:
        """Rows of all parts left out because their prompt is too long."""
        return sum(prompts.num_dropped for prompts in self._parts.values())

    @property
    def num_truncated(self) -> int:
        """Rows of all parts whose prompt was too long and is cut on the left."""
        return sum(prompts.num_truncated for prompts in self._parts.values())

    @property
    def epoch(self) -> float:
        """Passes over the first part so far."""
        return self._parts[self._names[0]].epoch

    def next(self) -> Prompt:
        """The next prompt."""
        name = self._name_at(self._position)
        with naming(name):
            prompt = self._parts[name].next()
        self._position += 1
        return _named(prompt, name)

    def take(self, num_prompts: int) -> list[Prompt]:
        """The first prompts of each part; parts alternate as in `next`."""
        left = {name: prompts.take(num_prompts)[::-1] for name, prompts in self._parts.items()}
        taken: list[Prompt] = []
        position = 0
        while len(taken) < num_prompts and any(left.values()):
            name = self._name_at(position)
            position += 1
            if left[name]:
                taken.append(_named(left[name].pop(), name))
        return taken

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Gives each part its own groups."""
        for summary in summaries:
            self._parts[summary.source].observe([summary])

    def settle(self, last_group_id: int) -> None:
        """Groups observed up to this id count."""
        for prompts in self._parts.values():
            prompts.settle(last_group_id)

    def metrics(self) -> dict[str, float]:
        """Sums over the parts, and each part's epoch."""
        sums: Counter[str] = Counter()
        for prompts in self._parts.values():
            sums.update(prompts.metrics())
        epochs = {f"sources/{name}/epoch": part.epoch for name, part in self._parts.items()}
        return {**sums, **epochs}

    def state(self) -> dict[str, Any]:
        """The cursors of all parts, for `restore`."""
        parts = {name: prompts.state() for name, prompts in self._parts.items()}
        return {"position": self._position, "parts": parts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            DataError: the state was taken over other parts, or over other rows of a part.
        """
        if list(state.get("parts", [])) != self._names:
            raise DataError(
                f"the parts of data.mixture changed since the checkpoint; now {self._names}",
                "restore them to resume, or start again in another run_dir",
            )
        for name, prompts in self._parts.items():
            with naming(name):
                prompts.restore(state["parts"][name])
        self._position = state["position"]

    def _name_at(self, position: int) -> str:
        point = (self._phase + position * _STRIDE) % _CIRCLE
        return self._names[bisect_right(self._ends, point)]


@contextlib.contextmanager
def naming(part: str) -> Iterator[None]:
    """Errors inside the context name the part."""
    try:
        yield
    except RayGrpoError as error:
        raise type(error)(f"part {part!r} of the mixture: {error.message}", error.fix) from error


def _named(prompt: Prompt, part: str) -> Prompt:
    return replace(prompt, id=f"{part}/{prompt.id}", source=part)
