"""HTTP exchange of both daemons: bounded body, one reply or one stream, heartbeats, client disconnects.

The exchange runs over ASGI; a gateway's also over RSGI (:mod:`cortex.rsgi_io`). It handles neither routes nor dialects:
heartbeats and errors are given as bytes. Rules of a stream: headers are held back for a moment so that an early failure
keeps its HTTP status; then they are sent, and heartbeats fill every silence; a disconnect cancels the work behind the
response at once. One module, since exchange and stream call each other in both directions.
"""

import abc
import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from cortex._fast.response_writer import ResponseWriter
from cortex.body_encoding import TAKEN, decoded
from cortex.request_body import BODY_TIMEOUT_S, read_at_most
from cortex.wire.errors import ApiError, BodyTooLargeError, SlowBodyError, UnsupportedEncodingError
from cortex.wire.headers import REQUEST_ID

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

T = TypeVar("T")

HOLD_HEADERS_S = 0.3
"""Time for which a stream's headers wait for its first bytes; clients need them within a second."""

HEARTBEAT_INTERVAL_S = 5.0
"""Longest silence on a stream; intermediaries have been seen to cut at 60 s and agents to warn at 20 s."""

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
        self.caller: object = None
        """Principal of the request, set by the layer that authenticates."""
        self.status = 0
        """HTTP status that was sent, 0 before that."""
        self.loop: asyncio.AbstractEventLoop | None = None
        """Event loop of the exchange, if known: looking it up costs a system call."""
        self.fast_request: object = None
        """State of a request that began on the fast path."""
        self.known_body: bytes | ApiError | None = None
        """Body, if it was read before, or the error of reading it."""
        self.body_timeout_s = BODY_TIMEOUT_S
        """Timeout of the body; see :mod:`cortex.request_body`."""
        self.is_alone = True
        """Whether its connection carries one request at a time."""
        self.extra_headers: dict[bytes, bytes] = {}
        """Headers of every response to the request, beside its own; a stream's are sent with its first bytes."""
        self.is_last = False
        """Whether the response announces the end of its connection."""

    @property
    def client(self) -> str:
        """Address of the client."""
        return self._client

    @abc.abstractmethod
    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name, or ``None``."""

    async def read_body(self, limit_bytes: int) -> bytes:
        """Return the whole body. A connection whose body is not read to its end is closed.

        Raises:
            BodyTooLargeError: it is longer than ``limit_bytes``, or in too many pieces.
            SlowBodyError: it takes too long.
            ClientDisconnectedError: the client disconnected before its end.
            ApiError: its content encoding cannot be decoded.
        """
        try:
            declared = self.check_length(limit_bytes)
            if isinstance(self.known_body, ApiError):
                raise self.known_body
            if self.known_body is not None:
                return self.known_body
            return await self.decode(await self._read(declared, limit_bytes), limit_bytes)
        except (BodyTooLargeError, SlowBodyError):
            self.is_last = self.is_last or self.is_alone
            raise

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
    """Whether :meth:`start_now` may be used: streams are started and written to without waiting."""

    def start_now(self, headers: Sequence[Header] = ()) -> ResponseWriter:
        """Send status 200 and the headers of an event stream; return its writer."""
        raise NotImplementedError

    @abc.abstractmethod
    async def finish(self) -> None:
        """End a started stream."""

    @abc.abstractmethod
    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``tell`` when the client disconnects; return a function that ends the watch. Use after the body was
        read.
        """

    async def decode(self, body: bytes, limit_bytes: int) -> bytes:
        """Return a body without its content encoding. Raises as :func:`cortex.body_encoding.decoded`."""
        encoding = self.header(b"content-encoding")
        if encoding is None:
            return body
        try:
            return await decoded(body, encoding.decode("latin-1"), limit_bytes)
        except UnsupportedEncodingError:
            self.extra_headers[b"accept-encoding"] = TAKEN.encode()
            raise

    def check_length(self, limit_bytes: int) -> int | None:
        """Return the declared length of the body, if any.

        Raises:
            BodyTooLargeError: it is more than ``limit_bytes``.
        """
        declared = self.header(b"content-length")
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
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        """End a started stream."""
        await self._send({"type": "http.response.body", "body": b""})

    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``tell`` when the client disconnects; return a function that ends the watch."""
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


class SocketExchange(AsgiExchange):
    """A request on a WebSocket, as an exchange.

    ``history`` holds the connection's conversations by the id of their last response.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        request_id: str,
        history: MutableMapping[str, tuple[msgspec.Raw, ...]],
    ) -> None:
        super().__init__(scope, receive, send, request_id=request_id)
        self.history = history
        self.generates = True
        """Whether an answer is wanted, and not only that the conversation is known."""


class EndedByDisconnect:
    """Context that is cancelled when the client disconnects. Enter only after the body was read.

    Raises:
        ClientDisconnectedError: the client disconnected; the block has ended by then.
    """

    __slots__ = ("_exchange", "_has_left", "_stop_watching", "_task")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __enter__(self) -> None:
        task = asyncio.current_task(self._exchange.loop)
        assert task is not None
        self._task = task
        self._has_left = False
        self._stop_watching = self._exchange.on_leave(self._leave)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_watching()
        if not self._has_left:
            return
        # Cancelled by this context alone, or also from elsewhere?
        is_ours = self._task.cancelling() == 1
        self._task.uncancel()
        if is_ours and isinstance(error, asyncio.CancelledError):
            raise ClientDisconnectedError from None

    def _leave(self) -> None:
        self._has_left = True
        self._task.cancel()


async def until_disconnect(exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` and return its result; cancel it when the client disconnects.

    Raises:
        ClientDisconnectedError: the client disconnected; ``work`` has ended by then.
    """
    with EndedByDisconnect(exchange):
        return await work


async def stream(
    exchange: Exchange,
    chunks: AsyncGenerator[bytes, None],
    *,
    heartbeat: bytes | Callable[[], bytes],
    error_event: Callable[[ApiError], bytes],
    headers: Sequence[Header] = (),
    hold_share: float = 1.0,
) -> None:
    """Send an event stream of ``chunks``, each of whole SSE events, as :func:`serve_stream` does.

    ``chunks`` is always closed before the stream is.
    """

    async def write(out: EventStream) -> None:
        async with aclosing(chunks):
            async for chunk in chunks:
                await out.write(chunk)

    await serve_stream(
        exchange, write, heartbeat=heartbeat, error_event=error_event, headers=headers, hold_share=hold_share
    )


async def serve_stream(
    exchange: Exchange,
    write: Callable[["EventStream"], Coroutine[Any, Any, None]],
    *,
    heartbeat: bytes | Callable[[], bytes],
    error_event: Callable[[ApiError], bytes],
    headers: Sequence[Header] = (),
    hold_share: float = 1.0,
) -> None:
    """Send the event stream that ``write`` writes, with heartbeats in its silences.

    Headers are held back for at most ``hold_share`` of the usual time. An :class:`ApiError` from ``write`` is raised
    again if no header was sent yet; later it becomes ``error_event`` and the end of the stream.

    Raises:
        ApiError: before the first byte.
        ClientDisconnectedError: the client disconnected; ``write`` has ended by then.
    """
    out = EventStream(exchange, heartbeat, headers, hold_share)
    try:
        with EndedByDisconnect(exchange):
            try:
                await write(out)
            except ApiError as error:
                if not out.started:
                    raise
                await out.write(error_event(error))
            await out.finish()
    finally:
        out.end()


class EventStream:
    """Writing side of a stream: headers once, heartbeats only between chunks.

    A stream has one timer at a time, which compares clock readings; a chunk sets none.
    """

    def __init__(
        self,
        exchange: Exchange,
        heartbeat: bytes | Callable[[], bytes],
        headers: Sequence[Header],
        hold_share: float = 1.0,
    ) -> None:
        self.started = False
        self.writes_at_once = exchange.writes_at_once
        """Whether :meth:`write_now` may be used."""
        self.writer: ResponseWriter | None = None
        """Writer that :meth:`write_now` uses, after its first call."""
        self._exchange = exchange
        self._heartbeat = heartbeat
        self._headers = headers
        self._lock: asyncio.Lock | None = None if exchange.writes_at_once else asyncio.Lock()
        self._loop = exchange.loop or asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._timer = self._loop.call_later(HOLD_HEADERS_S * hold_share, self._look)
        self._beating: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Send whole SSE events, after the headers if they are the first; return when more may be sent.

        Raises:
            ClientDisconnectedError: the client has disconnected, where the interface reports it here.
        """
        if self._lock is None:
            pause = self.write_now(data)
            if pause is not None:
                await pause
            return
        async with self._lock:
            if not self.started:
                self.started = True
                await self._exchange.start_stream(self._headers)
            await self._exchange.write(data)
            self._written_at = self._loop.time()

    def write_now(self, data: bytes) -> Coroutine[Any, Any, None] | None:
        """Send whole SSE events, after the headers if they are the first; return the coroutine to await before more is
        sent.

        A disconnect is raised by that coroutine, and reported by :meth:`Exchange.on_leave`.
        """
        if self.writer is None:
            self.started = True
            self.writer = self._exchange.start_now(self._headers)
        return self.writer.write(data)

    async def finish(self) -> None:
        """End the stream. Nothing may follow."""
        self.end()
        if self._lock is not None:
            await self._lock.acquire()
        if not self.started:
            self.started = True
            await self._exchange.start_stream(self._headers)
        await self._exchange.finish()

    def end(self) -> None:
        """Stop the heartbeats."""
        self._timer.cancel()
        if self._beating is not None:
            self._beating.cancel()

    def _look(self) -> None:
        """Send a heartbeat if it is due, and set the timer of the next one."""
        written_at = self._written_at if self.writer is None else self.writer.written_at
        silent_s = self._loop.time() - written_at
        due_s = HEARTBEAT_INTERVAL_S - silent_s
        if not self.started or due_s <= 0:
            due_s = HEARTBEAT_INTERVAL_S
            beat = self._heartbeat if isinstance(self._heartbeat, bytes) else self._heartbeat()
            if self._lock is None:
                self._beat_now(beat)
            elif self._beating is None or self._beating.done():
                self._beating = self._loop.create_task(self._beat(beat))
        self._timer = self._loop.call_later(due_s, self._look)

    async def _beat(self, beat: bytes) -> None:
        with suppress(ClientDisconnectedError):
            await self.write(beat)

    def _beat_now(self, beat: bytes) -> None:
        with suppress(ClientDisconnectedError):  # reported by on_leave
            pause = self.write_now(beat)
            if pause is not None:  # the client has not read what was sent; the next chunk waits for it
                pause.close()


def query_parameters(query: bytes) -> Mapping[str, str]:
    """Return the last value of each parameter of a query string."""
    return dict(parse_qsl(query.decode("latin-1")))
