"""How late an event loop is: what everybody else waited for, whoever made them wait.

A timer that is due every so often is late by as long as something held the loop up, be it a computation here or the
machine itself. Both daemons measure it and show it as a metric.
"""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.25
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


async def watch_lag(observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
    """Tell ``observe`` how late the running loop is, in seconds, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, clock() - due))
