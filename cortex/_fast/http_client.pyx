"""Keep-alive HTTP/1.1 connection to a node, and the response that arrives on it.

httptools parses; this module handles each piece of each response: whom to wake, when to pause a socket, how long a
node may be silent. :mod:`cortex.upstream` has the pool.

A node is not trusted: everything it sends beside a body (heads, interim responses, sizes and extensions of chunks,
trailers) is bounded in bytes, a head that has begun also in time, and a response that is read whole as a whole. Bytes
beyond a response end the connection, so that they cannot be taken for the next response.

One module: connection and response call each other for every read, which is cheap only within an extension.
"""

cimport cython
from libc.string cimport memchr

import asyncio
import socket

import httptools

from cortex._fast.buffer cimport Buffer, put, put_bytes, put_literal

from cortex.errors import ConnectionLostError, CutAnswerError, TooLongAnswerError
from cortex.wire.errors import UpstreamError, UpstreamTimeoutError

BUFFER_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_INTERIM_ANSWERS = 16
"""Number of 1xx responses before the final one."""
MAX_FRAMING_BYTES = 64 * 1024
"""Bytes received in a row within a body that are not body: chunk extensions, trailers."""
FRAMING_A_BYTE = 16
"""Bytes of framing allowed for each byte of a body beyond that: a body of one-byte chunks needs 5."""
KEEPALIVE_IDLE_S = 30

JOINED_BYTES = 16 * 1024
"""Size up to which a body is copied behind its head, to be written as one."""

cdef Py_ssize_t _BUFFER_BYTES = BUFFER_BYTES
cdef Py_ssize_t _JOINED_BYTES = JOINED_BYTES
cdef Py_ssize_t _MAX_HEAD_BYTES = MAX_HEAD_BYTES
cdef Py_ssize_t _MAX_FRAMING_BYTES = MAX_FRAMING_BYTES
cdef Py_ssize_t _FRAMING_A_BYTE = FRAMING_A_BYTE
cdef int _MAX_INTERIM_ANSWERS = MAX_INTERIM_ANSWERS


class StaleConnectionError(ConnectionLostError):
    """A kept-alive connection died before it answered; the request may go out again."""


def encode_head(bytes method not None, bytes target not None, bytes rest not None, headers):
    """Return a request's head without its end, so that lines can be added.

    ``rest`` follows ``target``: the version, and header lines that are known to be valid. ``headers`` are pairs of
    bytes. Raises ``ValueError`` for a line break in one.
    """
    cdef Buffer head = Buffer()
    cdef bytes name, value
    put_bytes(head, method)
    put_literal(head, b" ")
    put_bytes(head, target)
    put_bytes(head, rest)
    for name, value in headers:
        if has_break(name) or has_break(value):
            raise ValueError(f"line break in the headers {headers!r}")
        put_bytes(head, name)
        put_literal(head, b": ")
        put_bytes(head, value)
        put_literal(head, b"\r\n")
    return head.slice(0, head.size)


cdef list end_request(bytes head, bytes lines, bytes body):
    """Return a request in pieces, to be written one after another: its head, more lines of that, and its body."""
    cdef Buffer request = Buffer()
    cdef Py_ssize_t size = len(body)
    put_bytes(request, head)
    put_bytes(request, lines)
    put_literal(request, b"content-length: ")
    request.put_integer(size)
    put_literal(request, b"\r\n\r\n")
    if size > _JOINED_BYTES:
        return [request.slice(0, request.size), body]
    put_bytes(request, body)
    return [request.slice(0, request.size)]


cdef bint has_break(bytes text) noexcept:
    return memchr(<const char*>text, c"\n", len(text)) != NULL or memchr(<const char*>text, c"\r", len(text)) != NULL


cdef class Listener:
    """Observer of a response, notified in place of a waiting coroutine."""

    cdef int notify(self, Response response) except -1:
        """Process the data that has arrived, or the end."""
        return 0


@cython.final
cdef class Response:
    """Response of a node: after :meth:`begin`, ``status`` and ``headers`` are set, and the body comes by :meth:`read`.

    Close it, or read it to its end.
    """

    def __init__(self, Connection connection not None, head):
        self.headers = []
        self.head = head
        self.connection = connection
        self.chunks = []
        self.loop = connection.loop

    async def begin(self):
        """Return this response when its head has arrived; a cancelled call closes it.

        Raises:
            ConnectionLostError: the node closed the connection without a byte.
            UpstreamTimeoutError: it stayed silent.
            UpstreamError: it sent something that is not HTTP, or half a head.
        """
        try:
            await self.head
        except asyncio.CancelledError:
            if self.head.done() and not self.head.cancelled():
                self.head.exception()  # seen: it lost the race against the cancellation
            self.close()
            raise
        return self

    cpdef object header(self, bytes name):
        """Return a header by its lower-case name, or ``None``."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def is_complete(self):
        """Whether the whole body has arrived."""
        return self.connection is None and self.error is None

    async def read(self):
        """Return what has arrived, waiting for at least one byte; empty at the end of the body.

        Raises:
            UpstreamError: the body was cut short, or is not HTTP.
            UpstreamTimeoutError: the node has been silent for too long.
        """
        while not self.chunks:
            if self.connection is None:
                if self.error is not None:
                    raise self.error
                return b""
            await self.something()
        return self.take()

    async def read_all(self, Py_ssize_t limit_bytes):
        """Return the rest of the body.

        Raises:
            TooLongAnswerError: it is longer than ``limit_bytes``.
            UpstreamError: as :meth:`read`.
        """
        if len(self.chunks) == 1 and self.connection is None and self.error is None and self.unread_bytes <= limit_bytes:
            return self.take()  # it has come in one piece, as most do
        body = bytearray()  # and no list of pieces: of one byte each they would take forty times as much
        while chunk := await self.read():
            body += chunk
            if len(body) > limit_bytes:
                self.close()
                raise TooLongAnswerError(f"The node's answer is longer than the {limit_bytes} bytes that are read.")
        return bytes(body)

    cpdef object end_within(self, double limit_s):
        """Limit the time for the rest of the response."""
        if self.connection is not None:
            self.connection.bound(limit_s)

    cdef int untake(self, bytes body) except -1:
        """Put back the bytes of :meth:`take`, for another reader."""
        self.chunks.insert(0, body)
        self.unread_bytes += len(body)
        return 0

    def close(self):
        """Close the response. The connection is closed unless the body is complete."""
        if self.connection is not None:
            self.connection.fail(UpstreamError("The answer was given up."))

    async def __aiter__(self):
        while chunk := await self.read():
            yield chunk

    cdef object something(self):
        """Return a future that is done when data or the end has arrived."""
        self.waiter = waiter = self.loop.create_future()
        return waiter

    cdef bytes take(self):
        cdef list chunks = self.chunks
        self.chunks = []
        self.unread_bytes = 0
        if self.connection is not None:
            self.connection.resume()
        return <bytes>chunks[0] if len(chunks) == 1 else b"".join(chunks)

    # ------------------------------------------------------------ from the connection

    cdef int deliver(self) except -1:
        """Deliver the data of a read, or the end, to the listener or the waiting reader."""
        if self.listener is not None:
            self.listener.notify(self)
        elif self.waiter is not None and not self.waiter.done() and (self.chunks or self.connection is None):
            self.waiter.set_result(None)
        return 0

    cdef int ended(self, error) except -1:
        """Record the end of the body, or the error in its place."""
        self.connection = None
        self.error = error
        if not self.head.done():
            if error is None:
                self.head.set_result(None)
            else:
                self.head.set_exception(error)
                self.head.exception()  # retrieved: the waiting call may have been cancelled
        return 0


@cython.final
cdef class Connection:
    """TCP connection of a pool, which receives at most one response at a time. An asyncio protocol."""

    def __init__(self, pool, loop):
        self.pool = pool
        self.loop = loop
        self.parser = httptools.HttpResponseParser(self)

    # ------------------------------------------------------------ for the pool

    @property
    def usable(self):
        """Whether another request may be sent."""
        return self.transport is not None and not self.transport.is_closing()

    @property
    def idle_s(self):
        """Seconds since the last byte arrived."""
        return self.loop.time() - self.active_at

    def ask(
        self, bytes head not None, bytes body not None, double first_byte_s, double stall_s, double whole_s=0
    ):
        """Send a request whose head :func:`encode_head` began; return its response, which has not begun.

        The whole response has to arrive within ``whole_s``; 0: only silence is limited.
        """
        return self.send(head, b"", body, first_byte_s, stall_s, whole_s)

    cdef Response send(
        self, bytes head, bytes lines, bytes body, double first_byte_s, double stall_s, double whole_s
    ):
        """Send a request of a head, more lines of it, and a body; return its response, which has not begun."""
        cdef Response response
        cdef list data = end_request(head, lines, body)
        assert self.response is None
        self.response = response = Response(self, self.loop.create_future())
        self.head_bytes = 0
        self.in_head = self.in_body = False
        self.num_interim = 0
        self.ends_with_connection = True
        self.stall_s = stall_s
        self.whole_s = whole_s
        self.whole_until = self.loop.time() + whole_s if whole_s else 0
        self.head_until = 0
        if not self.usable:  # it broke between its making, or its last answer, and this
            self.finish(self.unanswered())
            return response
        self.watch(first_byte_s)
        if len(data) == 1:
            self.transport.write(data[0])
        else:
            self.transport.writelines(data)
        return response

    cdef unanswered(self):
        """Return the error of a connection that ended without a byte of an answer."""
        kind = StaleConnectionError if self.num_responses else ConnectionLostError
        return kind(f"{self.pool.name} closed the connection before it answered.", retry_after_s=1)

    def fail(self, error):
        """End the response with ``error`` and close the connection at once."""
        self.finish(error)
        self.abort()

    def abort(self):
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    cdef int resume(self) except -1:
        """Resume reading from the socket; the time spent paused was the reader's, not the node's."""
        if self.is_paused:
            self.is_paused = False
            self.active_at = self.loop.time()
            if self.usable:
                self.transport.resume_reading()
        return 0

    # ------------------------------------------------------------ from the transport

    def connection_made(self, transport):
        """Set the transport."""
        self.transport = transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def data_received(self, bytes data not None):
        """Parse data from the node."""
        cdef Response response = self.response
        # Until its head has been read, what is counted is of the answer before.
        cdef Py_ssize_t body_bytes = self.body_bytes if self.in_body else -1
        if response is None:  # no request is pending
            self.abort()
            return
        self.active_at = self.loop.time()
        if not self.in_body:
            self.head_bytes += len(data)
            if not self.in_head:  # from its first byte on a head has as long as a silence may be, however it comes
                self.in_head = True
                self.head_until = self.active_at + self.stall_s
                self.arm()
        else:
            self.wire_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.response is not None:
                self.fail(UpstreamError(f"{self.pool.name} sent what is not HTTP: {error}"))
            else:
                self.abort()
        else:
            if self.response is None:
                if self.is_beyond:
                    self.abort()
            elif not self.in_body:
                if self.head_bytes > _MAX_HEAD_BYTES:
                    self.fail(UpstreamError(f"{self.pool.name} sent more than {MAX_HEAD_BYTES} bytes of headers."))
                elif self.num_interim > _MAX_INTERIM_ANSWERS:
                    self.fail(UpstreamError(f"{self.pool.name} sent more than {MAX_INTERIM_ANSWERS} interim answers."))
            else:
                self.quiet_bytes = 0 if self.body_bytes > body_bytes else self.quiet_bytes + len(data)
                if (
                    self.quiet_bytes > _MAX_FRAMING_BYTES
                    or self.wire_bytes - self.body_bytes > _MAX_FRAMING_BYTES + _FRAMING_A_BYTE * self.body_bytes
                ):
                    self.fail(UpstreamError(f"{self.pool.name} sent more framing than answer."))
        response.deliver()

    def eof_received(self):
        """Let the transport close itself."""
        return None

    def pause_writing(self):
        """Do nothing: a request's body is complete when it is sent."""

    def resume_writing(self):
        """Do nothing, as in :meth:`pause_writing`."""

    def connection_lost(self, exc):
        """End the response that was being received."""
        cdef Response response = self.response
        self.pool.forget(self)
        if self.watchdog is not None:
            self.watchdog.cancel()
            self.watchdog = None
        if response is None:
            return
        name = self.pool.name
        if not self.head_bytes:
            self.finish(self.unanswered())
        elif self.in_body and self.ends_with_connection and exc is None:
            self.finish(None)
        else:
            self.finish(CutAnswerError(f"{name} closed the connection in the middle of its answer."))

    # ------------------------------------------------------------ from the parser

    def on_message_begin(self):
        """Mark a response that no request has asked for."""
        if self.response is None:
            self.is_beyond = True

    def on_header(self, bytes name not None, bytes value not None):
        """Add a header; trailers are dropped."""
        if self.in_body:
            return
        name = name.lower()
        if name == b"content-length" or name == b"transfer-encoding":
            self.ends_with_connection = False
        if self.response is not None:
            self.response.headers.append((name, value))

    def on_headers_complete(self):
        """Complete the head, which wakes the caller."""
        cdef Response response = self.response
        cdef int status = self.parser.get_status_code()
        if response is None:
            return
        self.in_head = False
        self.head_until = 0
        if status < 200:  # 100 Continue and its like: the answer is yet to come
            response.headers.clear()
            self.num_interim += 1
            return
        self.in_body = True
        self.wire_bytes = self.body_bytes = self.quiet_bytes = 0
        self.keeps_alive = self.parser.should_keep_alive()
        self.watch(self.stall_s)
        response.status = status
        if not response.head.done():
            response.head.set_result(None)

    def on_body(self, bytes chunk not None):
        """Add a piece of the body; pause reading at ``BUFFER_BYTES``."""
        cdef Response response = self.response
        if response is None:
            return
        response.chunks.append(chunk)
        response.unread_bytes += len(chunk)
        self.body_bytes += len(chunk)
        if response.unread_bytes > _BUFFER_BYTES and not self.is_paused and self.usable:
            self.is_paused = True
            self.transport.pause_reading()

    def on_message_complete(self):
        """End the response, and return the connection to the pool if it can be reused."""
        if not self.in_body or self.response is None:
            return
        # A node that answers before it has read the whole request leaves us mid-body: that connection is spent.
        reusable = self.keeps_alive and self.transport.get_write_buffer_size() == 0
        self.response.ended(None)  # the reader wakes at the end of this read
        self.response = None
        self.resume()
        self.num_responses += 1
        if reusable:
            self.pool.keep(self)
        else:
            self.abort()

    # ------------------------------------------------------------

    cdef int finish(self, error) except -1:
        cdef Response response = self.response
        self.response = None
        if response is not None:
            response.ended(error)
            response.deliver()
        return 0

    cdef int watch(self, double limit_s) except -1:
        """Allow the node ``limit_s`` of silence from now on."""
        self.limit_s = limit_s
        self.active_at = self.loop.time()
        return self.arm()

    cdef int bound(self, double limit_s) except -1:
        """Allow ``limit_s`` for the rest of the response, silent or not."""
        cdef double until = self.loop.time() + limit_s
        if not self.whole_until or until < self.whole_until:
            self.whole_s = limit_s
            self.whole_until = until
        return self.arm()

    cdef double due(self):
        """Return the deadline."""
        cdef double at = self.active_at + self.limit_s
        if self.whole_until and self.whole_until < at:
            at = self.whole_until
        if self.head_until and self.head_until < at:
            at = self.head_until
        return at

    cdef int arm(self) except -1:
        """Set a timer for the deadline.

        An earlier timer is kept, from one request to the next.
        """
        cdef double at = self.due()
        cdef double left_s
        if self.watchdog is not None:
            if self.watchdog.when() <= at:
                return 0
            self.watchdog.cancel()
        left_s = at - self.loop.time()
        self.watchdog = self.loop.call_later(left_s if left_s > 0 else 0, self.look)
        return 0

    def look(self):
        """Fail the response if the deadline has passed; else set the timer again."""
        cdef double now
        self.watchdog = None
        if self.response is None:
            return
        now = self.loop.time()
        if self.is_paused:
            self.active_at = now
        if now < self.due():
            self.arm()
            return
        what = "stopped in the middle of its answer" if self.in_body else "did not answer"
        if now >= self.active_at + self.limit_s:
            why = f"no byte for {self.limit_s:g} s"
        elif self.head_until and now >= self.head_until:
            why = f"a head that takes longer than {self.stall_s:g} s"
        else:
            why = f"not all of it within {self.whole_s:g} s"
        self.fail(UpstreamTimeoutError(f"{self.pool.name} {what}: {why}."))
