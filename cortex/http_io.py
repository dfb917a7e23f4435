"""HTTP exchange of both daemons: bounded body, one reply or one stream, client disconnects.

The exchange runs over ASGI; a gateway's also over RSGI (:mod:`cortex.server.rsgi_io`). It handles neither routes nor
dialects. A disconnect cancels the work behind the response at once.
"""

import abc
import asyncio
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from cortex._fast.response_writer import Writer
from cortex.body_encoding import TAKEN, decoded
from cortex.request_body import BODY_TIMEOUT_S, read_at_most
from cortex.wire.errors import BodyTooLargeError, SlowBodyError, UnsupportedEncodingError
from cortex.wire.headers import REQUEST_ID

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

T = TypeVar("T")

STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ClientDisconnectedError(Exception):
    """The client closed the connection before its answer was complete."""


class Exchange(abc.ABC):
    """Request and its response. Not reusable; one coroutine writes to it. Each server interface has a subclass."""

    def __init__(self, method: str, path: str, query: bytes, client: str, request_id: str) -> None:
        self.method = method
        self.path = path
        self.query = query
        self._client = client
        self.request_id = request_id
        self.extra_headers: dict[bytes, bytes] = {}
        """Headers of every response to the request, beside its own; a stream's are sent with its first bytes."""

    caller: object = None
    """Principal of the request, set by the layer that authenticates."""
    origin: object = None
    """Connection that the request is a message of, if it came in no request of HTTP."""
    status = 0
    """HTTP status that was sent, 0 before that."""
    loop: asyncio.AbstractEventLoop | None = None
    """Event loop of the exchange, if known: looking it up costs a system call."""
    disconnect_error: type[Exception] = ClientDisconnectedError
    """Error of :meth:`read_whole` for a client that disconnects."""
    body_timeout_s = BODY_TIMEOUT_S
    """Timeout of the body; see :mod:`cortex.request_body`."""
    is_alone = True
    """Whether its connection carries one request at a time."""
    is_last = False
    """Whether the response announces the end of its connection."""

    @property
    def client(self) -> str:
        """Address of the client."""
        return self._client

    @abc.abstractmethod
    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name, or ``None``."""

    def text_header(self, name: str) -> str | None:
        """Return a request header by its lower-case name, as text, or ``None``."""
        value = self.header(name.encode())
        return None if value is None else value.decode("latin-1")

    async def read_body(self, limit_bytes: int) -> bytes:
        """Return the whole body. A connection whose body is not read to its end is closed.

        Raises:
            BodyTooLargeError: it is longer than ``limit_bytes``, or in too many pieces.
            SlowBodyError: it takes too long.
            ClientDisconnectedError: the client disconnected before its end.
            ApiError: its content encoding cannot be decoded.
        """
        try:
            body = await self._read(self.check_length(limit_bytes), limit_bytes)
            encoding = self.text_header("content-encoding")
            return body if encoding is None else await self.decode(body, encoding, limit_bytes)
        except (BodyTooLargeError, SlowBodyError):
            self.is_last = self.is_last or self.is_alone
            raise

    def read_whole(self, limit_bytes: int) -> tuple[Awaitable[bytes], float] | None:
        """Return what to await for the whole body, and the seconds that it may take.

        ``None`` where :meth:`read_body` has more to do: the server does not assemble the body, or it is encoded. The
        caller reports a body that is late, by :func:`~cortex.request_body.slow_body`, and ``disconnect_error``.
        """
        return None

    @abc.abstractmethod
    async def _read(self, declared: int | None, limit_bytes: int) -> bytes:
        """Read a body whose declared length is ``declared``, if any; raise as :meth:`read_body` does."""

    @abc.abstractmethod
    async def reply(
        self, status: int, body: bytes, *, content_type: bytes = b"application/json", headers: Sequence[Header] = ()
    ) -> None:
        """Send a complete response."""

    @abc.abstractmethod
    async def start_stream(self, headers: Sequence[Header] = ()) -> None:
        """Send status 200 and the headers of an event stream."""

    @abc.abstractmethod
    async def write(self, data: bytes) -> None:
        """Send some bytes of a started stream; return when more may be sent.

        Raises:
            ClientDisconnectedError: the client has disconnected, where the interface reports it here.
        """

    writes_at_once = False
    """Whether the writer of :meth:`start_now` waits only for clients that do not read."""

    @abc.abstractmethod
    def start_now(self, headers: Sequence[Header] = ()) -> Writer:
        """Send status 200 and the headers of an event stream, or do so with the first bytes; return its writer."""

    @abc.abstractmethod
    async def finish(self) -> None:
        """End a started stream."""

    @abc.abstractmethod
    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the client disconnects; return a function that ends the watch. Use after the body was
        read.
        """

    async def decode(self, body: bytes, encoding: str, limit_bytes: int) -> bytes:
        """Return a body without its content encoding. Raises as :func:`cortex.body_encoding.decoded`."""
        try:
            return await decoded(body, encoding, limit_bytes)
        except UnsupportedEncodingError:
            self.extra_headers[b"accept-encoding"] = TAKEN.encode()
            raise

    def check_length(self, limit_bytes: int) -> int | None:
        """Return the declared length of the body, if any.

        Raises:
            BodyTooLargeError: it is more than ``limit_bytes``.
        """
        declared = self.text_header("content-length")
        if declared is None or not declared.isdigit():
            return None
        if len(declared) > 18:
            raise BodyTooLargeError(f"The request body is longer than the {limit_bytes} bytes that are read.")
        if int(declared) > limit_bytes:
            raise BodyTooLargeError(f"The request body has {int(declared)} bytes; at most {limit_bytes} are read.")
        return int(declared)


def find_header(headers: Iterable[Header], name: bytes) -> bytes | None:
    """Return a header of ASGI's by its lower-case name, or ``None``."""
    for key, value in headers:
        if key == name:
            return value
    return None


async def asgi_pieces(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the pieces of an ASGI body. Raises :class:`ClientDisconnectedError`."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def asgi_left(receive: Receive) -> None:
    """Return when a client that has sent its whole body disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class AsgiExchange(Exchange):
    """Exchange over ASGI."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, request_id: str) -> None:
        client = (scope.get("client") or ("", 0))[0]
        super().__init__(scope["method"], scope["path"], scope.get("query_string", b""), client, request_id)
        self._raw_headers: Sequence[Header] = scope["headers"]
        self._receive = receive
        self._send = send
        self._sends_head_only = self.method == "HEAD"
        self.is_alone = scope.get("http_version") != "2"
        self._held_head: list[Header] | None = None
        """Headers of a stream that go out with its first bytes."""

    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name, or ``None``."""
        return find_header(self._raw_headers, name)

    async def _read(self, declared: int | None, limit_bytes: int) -> bytes:
        return await read_at_most(limit_bytes, asgi_pieces(self._receive), self.body_timeout_s)

    async def reply(
        self, status: int, body: bytes, *, content_type: bytes = b"application/json", headers: Sequence[Header] = ()
    ) -> None:
        """Send a complete answer."""
        await self._start(
            status,
            [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers],
        )
        await self._send({"type": "http.response.body", "body": b"" if self._sends_head_only else body})

    async def start_stream(self, headers: Sequence[Header] = ()) -> None:
        """Send status 200 and the headers of an event stream."""
        await self._start(200, [*STREAM_HEADERS, *headers])

    async def write(self, data: bytes) -> None:
        """Send some bytes of a started stream."""
        await self._send_held_head()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def start_now(self, headers: Sequence[Header] = ()) -> Writer:
        """Return the writer of a stream; status 200 and its headers go out with the first bytes."""
        self._held_head = [*STREAM_HEADERS, *headers]
        return AsgiWriter(self)

    async def _send_held_head(self) -> None:
        head, self._held_head = self._held_head, None
        if head is not None:
            await self._start(200, head)

    async def finish(self) -> None:
        """End a started stream."""
        await self._send_held_head()
        await self._send({"type": "http.response.body", "body": b""})

    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the client disconnects; return a function that ends the watch."""
        watcher = asyncio.ensure_future(asgi_left(self._receive))

        def done(watcher: "asyncio.Future[None]") -> None:
            if not watcher.cancelled():
                watcher.exception()
                callback()

        watcher.add_done_callback(done)

        def end() -> None:
            watcher.remove_done_callback(done)
            watcher.cancel()

        return end

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.status = status
        request_id = self.request_id.encode()
        headers += [(REQUEST_ID, request_id), (b"request-id", request_id), *self.extra_headers.items()]
        if self.is_last:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


class AsgiWriter(Writer):
    """Writer of a stream over ASGI: every write is waited for."""

    def __init__(self, exchange: AsgiExchange) -> None:
        self._exchange = exchange

    def write(self, data: bytes) -> Coroutine[Any, Any, None]:
        """Return the coroutine that sends some bytes."""
        self.written_at = time.monotonic()
        return self._exchange.write(data)


class EndedByDisconnect:
    """Context that is cancelled when the client disconnects. Enter only after the body was read.

    Raises:
        ClientDisconnectedError: the client disconnected; the block has ended by then.
    """

    __slots__ = ("_exchange", "_has_disconnected", "_stop_watching", "_task")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __enter__(self) -> None:
        task = asyncio.current_task(self._exchange.loop)
        assert task is not None
        self._task = task
        self._has_disconnected = False
        self._stop_watching = self._exchange.on_disconnect(self._disconnect)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_watching()
        if not self._has_disconnected:
            return
        # Cancelled by this context alone, or also from elsewhere?
        is_ours = self._task.cancelling() == 1
        self._task.uncancel()
        if is_ours and isinstance(error, asyncio.CancelledError):
            raise ClientDisconnectedError from None

    def _disconnect(self) -> None:
        self._has_disconnected = True
        self._task.cancel()


async def until_disconnect(exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` and return its result; cancel it when the client disconnects.

    Raises:
        ClientDisconnectedError: the client disconnected; ``work`` has ended by then.
    """
    with EndedByDisconnect(exchange):
        return await work


def query_parameters(query: bytes) -> Mapping[str, str]:
    """Return the last value of each parameter of a query string."""
    return dict(parse_qsl(query.decode("latin-1")))
