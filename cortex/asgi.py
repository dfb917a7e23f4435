"""``app``: the gateway as an ASGI application, for ``granian --interface asgi cortex.asgi:app``.

The lifespan and nothing else; the paths are :mod:`cortex.gateway`'s. Each worker process has an ``app`` of its own,
with its own view of the fleet. ``CORTEX_CONFIG`` names the configuration.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from cortex import config, logs, reload, systemd, tracing
from cortex.ending import Ending
from cortex.endpoints import request_id_of
from cortex.gateway import Gateway
from cortex.http_io import Exchange, Receive, Scope, Send
from cortex.settings import ConfigError, split_address


class Application:
    """The ASGI callable. The gateway exists between the lifespan's startup and its shutdown."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self.gateway: Gateway | None = None
        self._reloader: reload.Reloader | None = None
        self._pulse: asyncio.Task[None] | None = None
        self._ending: Ending | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] == "http":
            assert self.gateway is not None, "the server did not run the lifespan"
            ending = self._ending
            assert ending is not None
            exchange = Exchange(scope, receive, send, request_id=request_id_of(scope["headers"]))
            exchange.is_last = ending.has_begun and scope["http_version"] != "2"
            ending.num_running += 1
            try:
                await self.gateway.handle(exchange)
            finally:
                ending.num_running -= 1
                ending.last_at = asyncio.get_running_loop().time()
        elif scope["type"] == "websocket":
            assert self.gateway is not None, "the server did not run the lifespan"
            await self.gateway.handle_socket(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            raise NotImplementedError(f"scope type {scope['type']}")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message: Mapping[str, Any] = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._start()
                except ConfigError as error:
                    await send({"type": "lifespan.startup.failed", "message": f"cortex: {error}"})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._pulse is not None:
                    self._pulse.cancel()
                if self._reloader is not None:
                    await self._reloader.stop()
                if self.gateway is not None:
                    await self.gateway.stop()
                await asyncio.to_thread(tracing.shut_down)
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _start(self) -> None:
        path = config.find(self._environment)
        loaded = reload.load(path, self._environment)
        gateway = loaded.config.gateway
        logs.configure(gateway.log_format)
        tracing.configure(gateway.trace_endpoint, "cortex", gateway.listen)
        self._reloader = reloader = reload.Reloader(path, self._environment, loaded, self._apply)
        self.gateway = Gateway(loaded.config, loaded.catalogue, loaded.keys, reloader.reload, lambda: reloader.error)
        await self.gateway.start()
        reloader.start()
        ports = [split_address(gateway.metrics_listen)[1]] if gateway.metrics_listen else []
        self._ending = Ending(gateway.drain_timeout_s, ports, self.gateway.end_requests, self.gateway.prepare_to_stop)
        self._ending.listen_to_signals()
        # Granian accepts connections from here on; where several workers are ready one by one, the first one says so.
        systemd.notify(systemd.READY)
        self._pulse = asyncio.create_task(systemd.stay_alive())

    def _apply(self, loaded: reload.Loaded) -> None:
        assert self.gateway is not None
        self.gateway.reconfigure(loaded.config, loaded.catalogue, loaded.keys)


app = Application()
