"""The time by which stored responses expire: that of the day, without its jumps.

A host whose clock is set a month ahead, or back to 1970, must not have every conversation expire at once. While a store
is open its time goes on by the monotonic clock; from one start to the next by the clock of the day, but backwards not
at all and forwards no more than some days at a time.
"""

import time
from collections.abc import Callable

MAX_STEP_S = 7 * 24 * 3600.0
"""How far the time may have gone on since the store was last written to. What lies beyond that, nobody has watched."""


class StoreClock:
    """The clock of one open store. Call it for the time in Unix seconds."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._base_s = wall()
        self._begun_s = monotonic()

    def begin(self, seen_s: float, ttl_s: float) -> None:
        """Go on from the time at which the store was last written to; 0 if it never was."""
        self._begun_s = self._monotonic()
        now = self._wall()
        self._base_s = min(max(now, seen_s), seen_s + min(MAX_STEP_S, ttl_s / 4)) if seen_s else now

    def __call__(self) -> float:
        """Return the time."""
        return self._base_s + self._monotonic() - self._begun_s
