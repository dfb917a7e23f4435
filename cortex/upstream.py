"""Pooled keep-alive HTTP/1.1 to nodes: one request at a time per connection, the answer as it arrives.

It knows HTTP and nothing of models or dialects. Its rules: only silence is timed, never length; a reader that falls
behind pauses the socket, so that a stream holds at most ``BUFFER_BYTES`` and one read; closing a response that is not
complete closes its connection at once, which is how a client's leaving reaches the node; a body that ends before its
framing says so is an error, never an end; a kept-alive connection that dies before a single byte of the answer is
replaced once, in silence.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import cast

import httptools

from cortex.config import Timeouts, split_endpoint
from cortex.errors import ConnectError, ConnectionLostError, PoolFullError
from cortex.wire.errors import ApiError, UpstreamError, UpstreamTimeoutError

Header = tuple[bytes, bytes]

BUFFER_BYTES = 64 * 1024
"""A response pauses its socket when this much is unread."""

MAX_HEAD_BYTES = 64 * 1024

KEEPALIVE_IDLE_S = 30
"""TCP keep-alive, for a host that vanishes while it makes an answer that is not streamed."""


class _StaleConnectionError(ConnectionLostError):
    """A kept-alive connection died before it answered; the request may go out again."""


class Response:
    """A node's answer: ``status`` and ``headers`` are there, the body comes by :meth:`read`.

    Close it, or read it to its end.
    """

    def __init__(self, connection: "_Connection", head: "asyncio.Future[None]") -> None:
        self.status = 0
        self.headers: list[Header] = []
        self._head = head
        self._connection: _Connection | None = connection
        self._chunks: list[bytes] = []
        self._unread_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: ApiError | None = None

    def header(self, name: bytes) -> bytes | None:
        """Return a header by its lower-case name, or ``None``."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def is_complete(self) -> bool:
        """Whether the whole body has arrived."""
        return self._connection is None and self._error is None

    async def read(self) -> bytes:
        """Return what has arrived, waiting for at least one byte; empty at the end of the body.

        Raises:
            UpstreamError: the body was cut short, or is not HTTP.
            UpstreamTimeoutError: the node has been silent for too long.
        """
        while not self._chunks:
            if self._connection is None:
                if self._error is not None:
                    raise self._error
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunks, self._chunks = self._chunks, []
        self._unread_bytes = 0
        if self._connection is not None:
            self._connection.resume()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.read():
            yield chunk

    async def read_all(self, limit_bytes: int) -> bytes:
        """Return the rest of the body.

        Raises:
            UpstreamError: as :meth:`read`; or it is longer than ``limit_bytes``.
        """
        chunks: list[bytes] = []
        size_bytes = 0
        while chunk := await self.read():
            size_bytes += len(chunk)
            if size_bytes > limit_bytes:
                self.close()
                raise UpstreamError(f"The node's answer is longer than the {limit_bytes} bytes that are read.")
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def close(self) -> None:
        """Give the answer up. The connection is closed unless the body is complete."""
        if self._connection is not None:
            self._connection.fail(UpstreamError("The answer was given up."))

    # ------------------------------------------------------------ from the connection

    def started(self) -> None:
        """Let the asker go on: the headers are complete."""
        if not self._head.done():
            self._head.set_result(None)

    def received(self, chunk: bytes) -> bool:
        """Keep a piece of the body; return whether the socket should pause."""
        self._chunks.append(chunk)
        self._unread_bytes += len(chunk)
        return self._unread_bytes > BUFFER_BYTES

    def ended(self, error: ApiError | None) -> None:
        """Take note of the end of the body, or of the error in its place."""
        self._connection = None
        self._error = error
        if not self._head.done():
            if error is None:
                self._head.set_result(None)
            else:
                self._head.set_exception(error)
        self.wake()

    def wake(self) -> None:
        """Let the reader look, if there is something to see."""
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self._chunks or self._connection is None):
            waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One TCP connection of a pool, with at most one response being received on it."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._active_at = 0.0
        self._limit_s = 0.0
        self._stall_s = 0.0
        self._head_bytes = 0
        self._in_body = False
        self._ends_with_connection = False
        self._keeps_alive = False
        self._paused = False
        self.num_responses = 0

    # ------------------------------------------------------------ for the pool

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: Sequence[bytes], first_byte_s: float, stall_s: float) -> tuple[Response, asyncio.Future[None]]:
        """Send a request; return its response and the future of that response's head."""
        assert self._response is None
        assert self._transport is not None
        head = self._loop.create_future()
        self._response = response = Response(self, head)
        self._head_bytes = 0
        self._in_body = False
        self._ends_with_connection = True
        self._stall_s = stall_s
        self._watch(first_byte_s)
        self._transport.writelines(data)
        return response, head

    def resume(self) -> None:
        """Read from the socket again; the time spent paused was the reader's, not the node's."""
        if self._paused:
            self._paused = False
            self._active_at = self._loop.time()
            if self.usable:
                assert self._transport is not None
                self._transport.resume_reading()

    def fail(self, error: ApiError) -> None:
        """End the response with ``error`` and close the connection at once."""
        self._finish(error)
        self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------ from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its ancestry
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:  # nobody asked
            self.abort()
            return
        self._active_at = self._loop.time()
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._response is not None:
                self.fail(UpstreamError(f"{self._pool.name} sent what is not HTTP: {error}"))
            else:
                self.abort()
            return
        if not self._in_body and self._response is not None and self._head_bytes > MAX_HEAD_BYTES:
            self.fail(UpstreamError(f"{self._pool.name} sent more than {MAX_HEAD_BYTES} bytes of headers."))
        response.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._response is None:
            return
        name = self._pool.name
        if not self._head_bytes:
            kind = _StaleConnectionError if self.num_responses else ConnectionLostError
            self._finish(kind(f"{name} closed the connection before it answered.", retry_after_s=1))
        elif self._in_body and self._ends_with_connection and exc is None:
            self._finish(None)
        else:
            self._finish(UpstreamError(f"{name} closed the connection in the middle of its answer."))

    # ------------------------------------------------------------ from the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False
        if self._response is not None:
            self._response.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        response = self._response
        if response is None:
            return
        if status < 200:  # 100 Continue and its like: the answer is yet to come
            response.headers.clear()
            return
        self._in_body = True
        self._keeps_alive = self._parser.should_keep_alive()
        self._watch(self._stall_s)
        response.status = status
        response.started()

    def on_body(self, chunk: bytes) -> None:
        response = self._response
        if response is not None and response.received(chunk) and not self._paused and self.usable:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if not self._in_body or self._response is None:
            return
        transport = self._transport
        assert transport is not None
        # A node that answers before it has read the whole request leaves us mid-body: that connection is spent.
        reusable = self._keeps_alive and transport.get_write_buffer_size() == 0
        self._finish(None)
        self.resume()
        self.num_responses += 1
        if reusable:
            self._pool.keep(self)
        else:
            self.abort()

    # ------------------------------------------------------------

    def _finish(self, error: ApiError | None) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.ended(error)

    def _watch(self, limit_s: float) -> None:
        """Give the node ``limit_s`` of silence from now on.

        A timer that is set stays, from one request to the next, if it is early enough: it looks at a clock.
        """
        self._limit_s = limit_s
        self._active_at = now = self._loop.time()
        if self._watchdog is not None:
            if self._watchdog.when() <= now + limit_s:
                return
            self._watchdog.cancel()
        self._watchdog = self._loop.call_later(limit_s, self._look)

    def _look(self) -> None:
        """Fail the response if the node has been silent; else look again when it could have been."""
        self._watchdog = None
        if self._response is None:
            return
        now = self._loop.time()
        if self._paused:
            self._active_at = now
        silent_s = now - self._active_at
        if silent_s < self._limit_s:
            self._watchdog = self._loop.call_later(self._limit_s - silent_s, self._look)
            return
        what = "stopped in the middle of its answer" if self._in_body else "did not answer"
        self.fail(UpstreamTimeoutError(f"{self._pool.name} {what}: no byte for {self._limit_s:g} s."))


class Pool:
    """The connections to one node. The most recently used one is used again; the others age and are closed by it."""

    def __init__(
        self,
        name: str,
        endpoint: str,
        timeouts: Timeouts,
        max_connections: int,
        *,
        secret: bytes = b"",
        ca_file: str = "",
    ) -> None:
        """``secret`` goes out with every request; ``ca_file`` takes the place of the system's authorities."""
        self.name = name
        self.timeouts = timeouts
        is_https = endpoint.startswith("https:")
        self._tls = ssl.create_default_context(cafile=ca_file or None) if is_https else None
        self._host, self._port, prefix = split_endpoint(endpoint)
        authority = f"[{self._host}]" if ":" in self._host else self._host
        self._prefix = prefix.encode()
        self._host_lines = f" HTTP/1.1\r\nhost: {authority}:{self._port}\r\n".encode()
        if secret:
            self._host_lines += b"authorization: Bearer " + secret + b"\r\n"
        self._max_connections = max_connections
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._connecting = 0
        self._closed = False
        self._ended: ApiError | None = None

    @property
    def num_connections(self) -> int:
        """Connections that are open or being opened."""
        return len(self._open) + self._connecting

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: Sequence[Header] = (),
        body: bytes = b"",
        *,
        first_byte_s: float | None = None,
        stall_s: float | None = None,
    ) -> Response:
        """Send a request and return when the headers of its answer are there.

        ``first_byte_s`` and ``stall_s`` take the place of the pool's own. Cancelling closes the connection.

        Raises:
            ConnectError: the node could not be reached.
            ConnectionLostError: it closed a fresh connection without a byte.
            PoolFullError: all connections are in use.
            UpstreamTimeoutError: it stayed silent.
            UpstreamError: it answered something that is not HTTP, or half a head.
        """
        if self._ended is not None:
            raise self._ended
        data = self._encode(method, target, headers, body)
        limits = (
            self.timeouts.first_byte_s if first_byte_s is None else first_byte_s,
            self.timeouts.stall_s if stall_s is None else stall_s,
        )
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                try:
                    return await self._exchange(connection, data, *limits)
                except _StaleConnectionError:
                    break
        return await self._exchange(await self._connect(), data, *limits)

    def keep(self, connection: _Connection) -> None:
        """Take back a connection that may serve another request."""
        if self._closed:
            connection.abort()
        else:
            self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        """Drop a connection that is closed."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def retire(self) -> None:
        """Take no connection back any more; answers under way go on to their end."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    def close(self, error: ApiError | None = None) -> None:
        """Close every connection; answers under way end with ``error``, and so does every later request."""
        self._closed = True
        self._ended = error or UpstreamError(f"The connection to {self.name} was closed.")
        for connection in tuple(self._open):
            connection.fail(self._ended)

    async def _exchange(
        self, connection: _Connection, data: Sequence[bytes], first_byte_s: float, stall_s: float
    ) -> Response:
        response, head = connection.send(data, first_byte_s, stall_s)
        try:
            await head
        except asyncio.CancelledError:
            if head.done() and not head.cancelled():
                head.exception()  # seen: it lost the race against the cancellation
            response.close()
            raise
        return response

    async def _connect(self) -> _Connection:
        if self.num_connections >= self._max_connections:
            raise PoolFullError(f"All {self._max_connections} connections to {self.name} are in use.", retry_after_s=1)
        self._connecting += 1
        try:
            async with asyncio.timeout(self.timeouts.connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            reason = f"no connection within {self.timeouts.connect_s:g} s"
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            self._open.add(connection)
            return connection
        finally:
            self._connecting -= 1
        raise ConnectError(f"{self.name} cannot be reached at {self._host}:{self._port}: {reason}.", retry_after_s=2)

    def _encode(self, method: bytes, target: bytes, headers: Sequence[Header], body: bytes) -> list[bytes]:
        lines = [b"%b: %b\r\n" % header for header in headers]
        num_breaks = len(lines)
        if body or method == b"POST":
            lines.append(b"content-length: %d\r\n" % len(body))
            num_breaks += 1
        given = b"".join(lines)
        if given.count(b"\n") != num_breaks or given.count(b"\r") != num_breaks:
            raise ValueError(f"line break in the headers {headers!r}")
        head = b"%b %b%b%b%b\r\n" % (method, self._prefix, target, self._host_lines, given)
        return [head, body] if body else [head]
