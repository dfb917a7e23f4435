"""Lag of an event loop: the delay that any callback had to wait.

A periodic timer is late by as long as the loop was held up, by a computation in the process or by the machine. Both
daemons export it as a metric.
"""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.25
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


async def watch_lag(observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
    """Call ``observe`` with the running loop's lag in seconds, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, clock() - due))
