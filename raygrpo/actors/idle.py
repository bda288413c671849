"""For how long somebody had nothing to do, measured where it happens."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple


class IdleReading(NamedTuple):
    """A process's clock, and for how much of it there was nothing to do, in seconds."""

    clock_s: float
    idle_s: float


class IdleClock:
    """Adds up spells without work; safe to read from other threads. Begins idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total_s = 0.0
        self._since: float | None = time.monotonic()

    def mark(self, *, busy: bool) -> None:
        """Says whether there is work from now on."""
        with self._lock:
            now = time.monotonic()
            if self._since is not None:
                self._total_s += now - self._since
            self._since = None if busy else now

    def read(self) -> IdleReading:
        """What has added up until now."""
        with self._lock:
            now = time.monotonic()
            open_s = 0.0 if self._since is None else now - self._since
            return IdleReading(now, self._total_s + open_s)


class IdleShare:
    """The share of idle time between readings of one clock."""

    def __init__(self) -> None:
        self._begin: IdleReading | None = None
        self._end: IdleReading | None = None

    def update(self, reading: IdleReading) -> None:
        """Takes the newest reading; an older one, overtaken by it, changes nothing."""
        if self._end is None or reading.clock_s > self._end.clock_s:
            self._end = reading
            self._begin = self._begin or reading

    def take(self) -> float | None:
        """The share between the last reading of the take before and the last one; None without
        two readings."""
        begin, end = self._begin, self._end
        if begin is None or end is None or end.clock_s <= begin.clock_s:
            return None
        self._begin = end
        return (end.idle_s - begin.idle_s) / (end.clock_s - begin.clock_s)
