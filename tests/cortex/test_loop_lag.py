"""Lag of event loops."""

import asyncio
import time

from fake_node import FakeNode
from gateway_rig import rig, until

from cortex.loop_lag import watch_lag
from neuron import metrics as neuron_metrics


async def test_a_blocked_loop_shows() -> None:
    lags: list[float] = []
    watching = asyncio.ensure_future(watch_lag(lags.append, 0.01))
    await until(lambda: lags)
    time.sleep(0.3)
    num_before = len(lags)
    await until(lambda: len(lags) > num_before)
    assert max(lags) > 0.2
    assert min(lags) >= 0
    watching.cancel()


async def test_both_daemons_show_it() -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        await until(lambda: gateway.metric("cortex_loop_lag_seconds_count"))
    assert b"neuron_loop_lag_seconds_bucket" in neuron_metrics.render((), (), ())
