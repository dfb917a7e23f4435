"""The time by which stored responses expire: the time of day without jumps.

A clock that is set a month ahead, or back to 1970, must not expire every conversation at once. While a store is open
its time follows the monotonic clock; from one start to the next the time of day, but never backwards, and forwards by
some days at most.
"""

import time
from collections.abc import Callable

MAX_STEP_S = 7 * 24 * 3600.0
"""Greatest step of the time between two starts."""


class StoreClock:
    """The clock of an open store. Call it for the time in Unix seconds."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._base_s = wall()
        self._begun_s = monotonic()

    def begin(self, seen_s: float, ttl_s: float) -> None:
        """Continue from the time of the store's last write; 0 if there was none."""
        self._begun_s = self._monotonic()
        now = self._wall()
        self._base_s = min(max(now, seen_s), seen_s + min(MAX_STEP_S, ttl_s / 4)) if seen_s else now

    def __call__(self) -> float:
        """Return the time."""
        return self._base_s + self._monotonic() - self._begun_s
