"""Life cycle of a worker process, for every interface: read the configuration, run the gateway, end.

It handles files and the process, not HTTP. ``CORTEX_CONFIG`` names the configuration.
"""

import asyncio
import gc
import logging
import os
import pathlib
import time
from collections.abc import Mapping

from cortex import config, logs, reload, systemd, tracing
from cortex._fast.scheduling import set_slices
from cortex.access import local
from cortex.gateway import Gateway
from cortex.http_io import Exchange
from cortex.memory import give_back_now_and_then
from cortex.server.ending import Ending, server_addresses
from cortex.settings import split_address, url_of
from cortex.wire import VERSION

log = logging.getLogger("cortex")

SLICE_NS = 100_000
"""Time slice of the process's threads. The server's thread and the loop's wake each other for each request; with the
usual slices, of 1.4 ms and more, the woken thread runs at once for one request. With short ones it runs when the other
waits, for all that have arrived, and other load on the machine delays neither.
"""

GARBAGE_AFTER = 10_000
"""Threshold of the garbage collector: a request in flight is hundreds of objects without a cycle."""


class Worker:
    """Serving process. Its attributes exist from :meth:`start` on."""

    gateway: Gateway
    """Gateway that answers the requests."""
    ending: Ending
    """Shutdown of the process, which counts its requests."""
    addresses: list[tuple[str, int]]
    """Addresses at which clients reach this process."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._reloader: reload.Reloader | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start serving.

        Raises:
            ConfigError: the configuration cannot be used.
        """
        path = config.find(self._environment)
        loaded = reload.load(path, self._environment)
        gateway = loaded.config.gateway
        logs.configure(gateway.log_format)
        tracing.configure(gateway.trace_endpoint, "cortex", gateway.listen)
        self._reloader = reloader = reload.Reloader(path, self._environment, loaded, self._apply)
        # Before anything else of this process listens: a server that is not `cortex serve` has an address of its own.
        self.addresses = served_at(gateway.listen)
        token = local.obtain(self.addresses[0][1], self._environment)
        self.gateway = Gateway(
            loaded.config,
            loaded.catalogue,
            loaded.keys,
            reloader.reload,
            lambda: reloader.error,
            token,
            lambda: reloader.added_models,
            lambda: reloader.added_keys,
        )
        await self.gateway.start()
        reloader.start(self.gateway.supervisor)
        ports = [split_address(gateway.metrics_listen)[1]] if gateway.metrics_listen else []
        self.ending = Ending(gateway.drain_timeout_s, ports, self.gateway.end_requests, self.gateway.prepare_to_stop)
        self.ending.listen_to_signals()
        announce(loaded, path, self.addresses)
        # Granian accepts connections from here on; of several workers, the first ready one notifies systemd.
        systemd.notify(systemd.READY)
        collect_seldom()
        set_slices(SLICE_NS)
        start = self.gateway.supervisor.start
        self._tasks = [start("systemd pulse", systemd.stay_alive), start("give back memory", give_back_now_and_then)]

    async def handle(self, exchange: Exchange) -> None:
        """Answer a request; during shutdown close its connection afterwards, if it carries no other."""
        ending = self.ending
        exchange.is_last = ending.has_begun and exchange.is_alone
        ending.num_running += 1
        try:
            await self.gateway.handle(exchange)
        finally:
            ending.num_running -= 1
            ending.last_at = time.monotonic()

    async def stop(self) -> None:
        """End what :meth:`start` began. Requests have ended by then."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._reloader is not None:
            await self._reloader.stop()
        await self.gateway.stop()
        await asyncio.to_thread(tracing.shut_down)

    def _apply(self, loaded: reload.Loaded) -> None:
        self.gateway.reconfigure(loaded.config, loaded.catalogue, loaded.keys)


def served_at(listen: str) -> list[tuple[str, int]]:
    """Return the addresses of the server's sockets, or ``listen`` while it has none."""
    wanted = split_address(listen)
    found = server_addresses()
    return [wanted] if not found or any(port == wanted[1] for _, port in found) else found


def announce(loaded: reload.Loaded, path: pathlib.Path | None, addresses: list[tuple[str, int]]) -> None:
    """Log the start: version, addresses, models, and whether keys are required."""
    gateway = loaded.config.gateway
    scheme = "https" if gateway.tls_certificate else "http"
    at = ",".join(url_of(scheme, *address) for address in addresses)
    fields = {
        "version": VERSION,
        "at": at,
        "dashboard": f"{url_of(scheme, *addresses[0])}/",
        "metrics": f"http://{gateway.metrics_listen}/metrics" if gateway.metrics_listen else "off",
        "config": path or config.NO_FILE,
        "nodes": ",".join(f"{node.name}={node.endpoint}" for node in loaded.config.neurons),
        "models": len(loaded.catalogue.profiles),
        "keys": "off" if loaded.keys.is_open else len(loaded.keys.principals),
    }
    log.info("started", extra={"fields": fields})
    if split_address(gateway.listen)[1] not in {port for _, port in addresses}:
        log.warning(
            "the server listens at %s, and gateway.listen is %s, which only `cortex serve` reads; "
            "granian takes --host and --port, or GRANIAN_HOST and GRANIAN_PORT",
            at,
            gateway.listen,
        )


def collect_seldom() -> None:
    """Exempt the present objects from garbage collection, and collect others seldom."""
    gc.freeze()  # modules and configuration stay
    gc.set_threshold(GARBAGE_AFTER, *gc.get_threshold()[1:])
