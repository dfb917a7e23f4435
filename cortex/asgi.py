"""``app``: the gateway as an ASGI application, for ``granian --interface asgi cortex.asgi:app``.

The lifespan, and requests as the express way wants them; the paths are :mod:`cortex.gateway`'s. Each worker process has
an ``app`` of its own, with its own view of the fleet.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from cortex._fast.watches import Watches
from cortex.endpoints import request_id_of
from cortex.express import Express
from cortex.http_io import AsgiExchange, Header, Receive, Scope, Send, asgi_left, asgi_pieces, find_header
from cortex.settings import ConfigError
from cortex.worker import Worker


class _Headers:
    """A request's headers by name, as text."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[Header]) -> None:
        self._pairs = pairs

    def get(self, name: str) -> str | None:
        """Return a header by its lower-case name, or ``None``."""
        value = find_header(self._pairs, name.encode())
        return None if value is None else value.decode("latin-1")


class _Head:
    """A request's head as the express way wants it."""

    __slots__ = ("headers", "method", "path")

    def __init__(self, scope: Scope) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = _Headers(scope["headers"])


class _Protocol:
    """A request's body and its answer as the express way wants them: the answer is given at once, and sent later."""

    __slots__ = ("_answer", "_receive", "_send")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._answer: tuple[int, list[tuple[str, str]], bytes] = 500, [], b""

    async def __call__(self) -> bytes:
        """Return the whole body. Raises :class:`ClientDisconnectedError`."""
        return b"".join([piece async for piece in asgi_pieces(self._receive)])

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Take the answer."""
        self._answer = status, headers, body

    async def flush(self) -> None:
        """Send the answer."""
        status, texts, body = self._answer
        headers = [(name.encode(), value.encode("latin-1")) for name, value in texts]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def client_disconnect(self) -> "asyncio.Future[None]":
        """Return what is done when the client has left."""
        return asyncio.ensure_future(asgi_left(self._receive))


class Application(Worker):
    """The ASGI callable."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] == "http":
            trip = self._express.way.begin(_Head(scope), _Protocol(receive, send))
            if trip is None:
                given = find_header(scope["headers"], b"x-request-id")
                exchange = AsgiExchange(scope, receive, send, request_id=request_id_of(given))
            elif await trip.answer():
                return
            else:
                exchange = AsgiExchange(scope, receive, send, request_id=trip.record.request_id)
                exchange.trip, exchange.known_body = trip, trip.body
            await self.handle(exchange, may_be_last=scope.get("http_version") != "2")
        elif scope["type"] == "websocket":
            await self.gateway.handle_socket(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            raise NotImplementedError(f"scope type {scope['type']}")

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take requests from now on, on this loop."""
        self._express = Express(self.gateway, self.ending, Watches(loop), flushes=True)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message: Mapping[str, Any] = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.start()
                    self.open(asyncio.get_running_loop())
                except ConfigError as error:
                    await send({"type": "lifespan.startup.failed", "message": f"cortex: {error}"})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return


app = Application()
