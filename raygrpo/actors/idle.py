"""How long a process had nothing to do, measured in that process."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple


class IdleReading(NamedTuple):
    """A process's clock, and its idle time so far, in seconds. Example: IdleReading(12.0, 5.0)."""

    clock_s: float
    idle_s: float


class IdleClock:
    """Adds up the spells without work; other threads may read it. Begins idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total_s = 0.0
        self._since: float | None = time.monotonic()

    def mark(self, *, busy: bool) -> None:
        """There is work from now on, or there is none."""
        with self._lock:
            now = time.monotonic()
            if self._since is not None:
                self._total_s += now - self._since
            self._since = None if busy else now

    def read(self) -> IdleReading:
        """The reading as of now."""
        with self._lock:
            now = time.monotonic()
            open_s = 0.0 if self._since is None else now - self._since
            return IdleReading(now, self._total_s + open_s)


class IdleShare:
    """The share of idle time between two readings of one clock; shares leave no gap."""

    def __init__(self) -> None:
        self._begin: IdleReading | None = None
        self._end: IdleReading | None = None

    def update(self, reading: IdleReading) -> None:
        """Takes a reading; one that is older than the newest changes nothing."""
        if self._end is None or reading.clock_s > self._end.clock_s:
            self._end = reading
            self._begin = self._begin or reading

    def take(self) -> float | None:
        """The idle share since the last take; None without two readings in that time."""
        begin, end = self._begin, self._end
        if begin is None or end is None or end.clock_s <= begin.clock_s:
            return None
        self._begin = end
        return (end.idle_s - begin.idle_s) / (end.clock_s - begin.clock_s)
