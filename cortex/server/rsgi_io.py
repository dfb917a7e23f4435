"""HTTP exchanges and WebSockets over RSGI, Granian's own interface.

Granian queues a stream without limit, so that back-pressure has to come from elsewhere: a stream goes on while its
:class:`~cortex.server.send_window.SendWindow` allows, or over HTTP/2, where streams share a connection, its
:class:`~cortex.server.send_window.SharedSendWindow`. Granian reports a client's disconnect only when asked
(:mod:`cortex._fast.watches`).
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from cortex import request_body
from cortex._fast.response_writer import ResponseWriter, WriteCoalescer
from cortex._fast.watches import Watches
from cortex.http_io import STREAM_HEADERS, ClientDisconnectedError, Exchange, Header
from cortex.request_body import WHOLE_BYTES, read_at_most
from cortex.server.send_window import FREE_BYTES, FREE_SHARED_BYTES, SendWindow, SharedSendWindow
from cortex.wire import headers as names

TextHeader = tuple[str, str]

HTTP_2 = "2"

_REQUEST_ID = names.REQUEST_ID.decode()


class RsgiExchange(Exchange):
    """A request that came over RSGI."""

    disconnect_error = ProtocolClosed
    _writer: ResponseWriter | None = None
    _shared: SharedSendWindow | None = None
    """Send window of the connection, if other exchanges share it."""

    def __init__(self, scope: Any, protocol: Any, watches: Watches, coalescer: WriteCoalescer) -> None:
        headers = scope.headers
        given = headers.get(_REQUEST_ID)
        id = names.request_id_of(None if given is None else given.encode())
        super().__init__(scope.method, scope.path, scope.query_string.encode(), scope.client, id)
        self.loop = watches.loop
        self._scope = scope
        self.text_header = headers.get  # type: ignore[method-assign] # a call less for each header
        self._protocol = protocol
        self._watches = watches
        self._coalescer = coalescer
        if scope.http_version == HTTP_2:
            self._shared = SharedSendWindow.for_connection(scope.client, scope.server)
            self.is_alone = False

    @property
    def client(self) -> str:
        """Address of the client."""
        return self._client.rpartition(":")[0].strip("[]")

    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name, or ``None``."""
        value: str | None = self.text_header(name.decode())
        if value is None and name == b"host":
            value = getattr(self._scope, "authority", None)  # as HTTP/2 has it
        return None if value is None else value.encode()

    def read_whole(self, limit_bytes: int) -> tuple[Awaitable[bytes], float] | None:
        """Return what to await for a body of a declared size, which Granian assembles at less cost."""
        declared = self.text_header("content-length")
        if declared is None or len(declared) > 7 or not declared.isdigit():
            return None
        size_bytes = int(declared)
        if size_bytes > limit_bytes or size_bytes > WHOLE_BYTES or self.text_header("content-encoding") is not None:
            return None
        return self._protocol(), self.body_timeout_s + size_bytes / request_body.BYTES_A_SECOND

    async def _read(self, declared: int | None, limit_bytes: int) -> bytes:
        try:
            return await read_at_most(limit_bytes, self._pieces(), self.body_timeout_s)
        except ProtocolClosed:
            raise ClientDisconnectedError from None

    async def _pieces(self) -> AsyncIterator[bytes]:
        async for piece in self._protocol:
            yield piece

    async def reply(
        self, status: int, body: bytes, *, content_type: bytes = b"application/json", headers: Sequence[Header] = ()
    ) -> None:
        """Send a complete answer."""
        self.status = status
        texts = [("content-type", _text(content_type)), ("content-length", str(len(body)))]
        if self.method == "HEAD":
            body = b""  # over HTTP/2 the server would send it
        if self._shared is not None:
            self._shared.record_sent(len(body))
        self._protocol.response_bytes(status, self._finish_texts(texts, headers), body)

    async def start_stream(self, headers: Sequence[Header] = ()) -> None:
        """Send status 200 and the headers of an event stream."""
        self.start_now(headers)

    async def write(self, data: bytes) -> None:
        """Send some bytes of a started stream."""
        assert self._writer is not None
        pause = self._writer.write(data)
        if pause is not None:
            await pause

    writes_at_once = True

    def start_now(self, headers: Sequence[Header] = ()) -> ResponseWriter:
        """Send status 200 and the headers of an event stream; return its writer."""
        self.status = 200
        transport = self._protocol.response_stream(200, self._finish_texts([*STREAM_TEXTS], headers))
        shared = self._shared
        extend = SendWindow(self._client, self._scope.server).extend if shared is None else shared.for_stream()
        free_bytes = FREE_BYTES if shared is None else FREE_SHARED_BYTES
        is_tls = self._scope.scheme == "https"
        self._writer = ResponseWriter(
            transport.send_bytes, extend, free_bytes, self._coalescer, is_tls=is_tls, counts_framing=shared is None
        )
        return self._writer

    async def finish(self) -> None:
        """End a started stream."""
        assert self._writer is not None
        self._writer.close()

    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the client disconnects; return a function that ends the watch."""
        return self._watches.begin(self._protocol, callback).end

    def _finish_texts(self, texts: list[TextHeader], headers: Sequence[Header]) -> list[TextHeader]:
        """Add ``headers`` and the headers of every response to ``texts``."""
        texts += [(name.decode(), _text(value)) for name, value in headers]
        texts += (_REQUEST_ID, self.request_id), ("request-id", self.request_id)
        if self.extra_headers:
            texts += [(name.decode(), _text(value)) for name, value in self.extra_headers.items()]
        if self.is_last:
            texts.append(("connection", "close"))
        return texts


@functools.lru_cache(maxsize=64)
def _text(value: bytes) -> str:
    """Return a header's value without the characters at which Granian panics: a node chooses some of them."""
    text = value.decode("latin-1")
    return text if text.isascii() and text.isprintable() else "".join(c for c in text if " " <= c <= "~")


STREAM_TEXTS = tuple((name.decode(), _text(value)) for name, value in STREAM_HEADERS)


class RsgiSocket:
    """WebSocket as ASGI messages, for its endpoint."""

    def __init__(self, scope: Any, protocol: Any) -> None:
        self.scope: MutableMapping[str, Any] = {
            "type": "websocket",
            "path": scope.path,
            "query_string": scope.query_string.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in scope.headers.items()],
            "client": (scope.client.rpartition(":")[0].strip("[]"), 0),
            "extensions": {"websocket.http.response": {}},
        }
        self._protocol = protocol
        self._transport: Any = None
        self._is_asked = False
        self._lock = asyncio.Lock()

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next message."""
        if not self._is_asked:
            self._is_asked = True
            return {"type": "websocket.connect"}
        try:
            message = await self._transport.receive()
        except ProtocolClosed:
            return {"type": "websocket.disconnect"}
        if message.kind == 0:
            return {"type": "websocket.disconnect"}
        return {"type": "websocket.receive", "text" if message.kind == 2 else "bytes": message.data}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send one message. Concurrent sends wait for each other: Granian takes one at a time."""
        match message["type"]:
            case "websocket.accept":
                self._transport = await self._protocol.accept()
            case "websocket.send":
                async with self._lock:
                    try:
                        await self._transport.send_str(message["text"])
                    except ProtocolClosed:
                        return  # as over ASGI: a disconnect is received, not raised here
            case "websocket.close":
                async with self._lock:
                    self._protocol.close(message.get("code") if self._transport is not None else 403)
            case "websocket.http.response.start":
                self._protocol.close(message["status"])

    def end(self) -> None:
        """Release the connection: it stays open while its transport is referenced."""
        self._transport = None
        self._protocol.close()
