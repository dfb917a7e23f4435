"""The life of one worker process, whichever interface serves it: read the configuration, run the gateway, end.

It knows the files and the process, not HTTP. ``CORTEX_CONFIG`` names the configuration.
"""

import asyncio
import gc
import os
import time
from collections.abc import Mapping

from cortex import config, logs, reload, systemd, tracing
from cortex.ending import Ending
from cortex.gateway import Gateway
from cortex.http_io import Exchange
from cortex.settings import split_address

GARBAGE_AFTER = 10_000
"""Objects made, less those given up, before cycles are looked for: a request in flight is hundreds that are none."""


class Worker:
    """A process that serves. The gateway exists between :meth:`start` and :meth:`stop`."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._gateway: Gateway | None = None
        self._reloader: reload.Reloader | None = None
        self._pulse: asyncio.Task[None] | None = None
        self._ending: Ending | None = None

    @property
    def gateway(self) -> Gateway:
        """What answers requests."""
        assert self._gateway is not None, "the server did not start the application"
        return self._gateway

    async def start(self) -> None:
        """Begin to serve.

        Raises:
            ConfigError: the configuration cannot be used.
        """
        path = config.find(self._environment)
        loaded = reload.load(path, self._environment)
        gateway = loaded.config.gateway
        logs.configure(gateway.log_format)
        tracing.configure(gateway.trace_endpoint, "cortex", gateway.listen)
        self._reloader = reloader = reload.Reloader(path, self._environment, loaded, self._apply)
        self._gateway = Gateway(loaded.config, loaded.catalogue, loaded.keys, reloader.reload, lambda: reloader.error)
        await self._gateway.start()
        reloader.start()
        ports = [split_address(gateway.metrics_listen)[1]] if gateway.metrics_listen else []
        self._ending = Ending(gateway.drain_timeout_s, ports, self._gateway.end_requests, self._gateway.prepare_to_stop)
        self._ending.listen_to_signals()
        # Granian accepts connections from here on; where several workers are ready one by one, the first one says so.
        systemd.notify(systemd.READY)
        collect_seldom()
        self._pulse = asyncio.create_task(systemd.stay_alive())

    async def handle(self, exchange: Exchange, *, may_be_last: bool = True) -> None:
        """Answer one request; when the process is ending, as the last one on its connection if that may be said."""
        ending = self._ending
        assert ending is not None
        exchange.is_last = ending.has_begun and may_be_last
        ending.num_running += 1
        try:
            await self.gateway.handle(exchange)
        finally:
            ending.num_running -= 1
            ending.last_at = time.monotonic()

    async def stop(self) -> None:
        """End what :meth:`start` began. Requests have ended by then."""
        if self._pulse is not None:
            self._pulse.cancel()
        if self._reloader is not None:
            await self._reloader.stop()
        if self._gateway is not None:
            await self._gateway.stop()
        await asyncio.to_thread(tracing.shut_down)

    def _apply(self, loaded: reload.Loaded) -> None:
        self.gateway.reconfigure(loaded.config, loaded.catalogue, loaded.keys)


def collect_seldom() -> None:
    """Have the garbage collector look at nothing that is there now, and seldom at what comes."""
    gc.freeze()  # modules and configuration stay
    gc.set_threshold(GARBAGE_AFTER, *gc.get_threshold()[1:])
