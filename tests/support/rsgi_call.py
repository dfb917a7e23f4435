"""Granian's side of RSGI in this process, over the two callables that ASGI has for a client.

As in Granian, output is queued without limit and sent in the background, a disconnect is reported on request, and a
stream ends when its writer is gone. There is no socket whose unread bytes the kernel counts: :class:`SendWindow` counts
the queue instead.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, ClassVar
from unittest import mock

from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from cortex._fast.response_writer import ResponseWriter
from cortex.http_io import ClientDisconnectedError, asgi_left, asgi_pieces
from cortex.server import rsgi_io

WINDOW_BYTES = 1024


class Scope:
    """A request's head."""

    proto = "http"
    http_version = "1.1"
    scheme = "http"
    server = "127.0.0.1:31313"

    def __init__(self, scope: Mapping[str, Any], number: int) -> None:
        self.method = scope["method"]
        self.path = scope["path"]
        self.query_string = scope.get("query_string", b"").decode()
        self.client = f"{scope['client'][0]}:{number}"
        self.headers = {name.decode(): value.decode() for name, value in reversed(scope["headers"])}


class Protocol:
    """The application's end of one request."""

    def __init__(self, receive: Any, send: Any, *, sends_head_only: bool) -> None:
        self._receive = receive
        self._send = send
        self._sends_head_only = sends_head_only
        self._queue: deque[dict[str, Any]] = deque()
        self._wake = asyncio.Event()
        self.is_streaming = False
        self.queued_bytes = 0
        self.emptied = asyncio.Event()

    async def __call__(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in asgi_pieces(self._receive):
                yield piece
        except ClientDisconnectedError:
            raise ProtocolClosed from None

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Answer."""
        self._put_head(status, headers)
        self._put({"type": "http.response.body", "body": b"" if self._sends_head_only else body})

    def response_stream(self, status: int, headers: list[tuple[str, str]]) -> "Transport":
        """Begin a stream."""
        self._put_head(status, headers)
        self.is_streaming = True
        return Transport(self)

    def client_disconnect(self) -> "asyncio.Future[None]":
        """Return what is done when the client has gone."""
        return asyncio.ensure_future(asgi_left(self._receive))

    async def pump(self) -> None:
        """Send what is queued, and what will be."""
        while True:
            while self._queue:
                message = self._queue.popleft()
                await self._send(message)
                self.queued_bytes -= len(message.get("body", b""))
            self.emptied.set()
            self._wake.clear()
            await self._wake.wait()

    async def finish(self) -> None:
        """End the stream, if it is one, and return when all is sent."""
        if self.is_streaming:
            self._put({"type": "http.response.body", "body": b""})
        await self.emptied.wait()

    def put_piece(self, data: bytes) -> None:
        """Queue a piece of a stream."""
        self._put({"type": "http.response.body", "body": data, "more_body": True})

    def _put_head(self, status: int, headers: list[tuple[str, str]]) -> None:
        encoded = [(name.encode(), value.encode()) for name, value in headers]
        self._put({"type": "http.response.start", "status": status, "headers": encoded})

    def _put(self, message: dict[str, Any]) -> None:
        self._queue.append(message)
        self.queued_bytes += len(message.get("body", b""))
        self.emptied.clear()
        self._wake.set()


class Transport:
    """Writer of a stream."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol

    def send_bytes(self, data: bytes) -> None:
        """Queue a piece."""
        self._protocol.put_piece(data)


class SendWindow:
    """Stands in for :class:`cortex.server.send_window.SendWindow`."""

    protocols: ClassVar[dict[str, Protocol]] = {}

    def __init__(self, client: str, server: str) -> None:
        self._protocol = self.protocols[client]

    async def extend(self, writer: ResponseWriter) -> None:
        """Return when the reader has read it."""
        await self._protocol.emptied.wait()
        writer.limit_bytes = writer.sent_bytes + WINDOW_BYTES


class Server:
    """Calls an application as Granian would. ``serve`` is its ``__rsgi__``."""

    def __init__(self, serve: Any) -> None:
        self._serve = serve
        self._num_calls = 0

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request."""
        self._num_calls += 1
        protocol = Protocol(receive, send, sends_head_only=scope["method"] == "HEAD")
        head = Scope(scope, self._num_calls)
        SendWindow.protocols[head.client] = protocol
        pump = asyncio.ensure_future(protocol.pump())
        try:
            await self._serve(head, protocol)
            await protocol.finish()
        finally:
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pump
            del SendWindow.protocols[head.client]


@contextlib.contextmanager
def no_sockets() -> Iterator[None]:
    """Have streams ask the queue what their readers have read."""
    with mock.patch.object(rsgi_io, "SendWindow", SendWindow), mock.patch.object(rsgi_io, "FREE_BYTES", WINDOW_BYTES):
        yield
