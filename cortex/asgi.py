"""``app``: the gateway as an ASGI application, for ``granian --interface asgi cortex.asgi:app``.

The lifespan and nothing else; the paths are :mod:`cortex.gateway`'s. Each worker process has an ``app`` of its own,
with its own view of the fleet.
"""

from collections.abc import Mapping
from typing import Any

from cortex.endpoints import request_id_of
from cortex.http_io import AsgiExchange, Receive, Scope, Send
from cortex.settings import ConfigError
from cortex.worker import Worker


class Application(Worker):
    """The ASGI callable."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] == "http":
            given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
            exchange = AsgiExchange(scope, receive, send, request_id=request_id_of(given))
            await self.handle(exchange, may_be_last=scope.get("http_version") != "2")
        elif scope["type"] == "websocket":
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
                    await self.start()
                except ConfigError as error:
                    await send({"type": "lifespan.startup.failed", "message": f"cortex: {error}"})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return


app = Application()
