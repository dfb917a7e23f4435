"""Pooled keep-alive HTTP/1.1 connections to nodes: one request at a time per connection, responses as they arrive.

It handles HTTP, not models or dialects. Rules: only silence is timed unless the caller bounds the whole; a slow reader
pauses the socket, so that a stream holds at most ``BUFFER_BYTES`` and one read; closing an incomplete response closes
its connection at once, which propagates a client's disconnect to the node; a body that ends before its framing does is
an error; a kept connection that dies before a byte of the response is replaced once, unless the caller asks for the
error.
"""

import asyncio
import ssl
from collections.abc import Sequence
from typing import cast

from cortex._fast.http_client import Connection, Response, StaleConnectionError, encode_head
from cortex.config import Timeouts, split_endpoint
from cortex.errors import ConnectError, PoolFullError
from cortex.wire.errors import ApiError, UpstreamError

Header = tuple[bytes, bytes]

MAX_IDLE_S = 4.0
"""Idle time after which a kept connection is not used. Servers close theirs after a while (5 s is the shortest common
time, a neuron's is 30), and a request sent at that moment looks as if it had killed the server.
"""


class Pool:
    """Connections to one node. The most recently used one is reused; the others age and are closed."""

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
        """``secret`` is sent with every request; ``ca_file`` replaces the system's authorities."""
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
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._connecting = 0
        self._closed = False
        self._ended: ApiError | None = None

    @property
    def num_connections(self) -> int:
        """Number of connections that are open or being opened."""
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
        whole_s: float = 0,
        is_fresh: bool = False,
        tells_stale: bool = False,
    ) -> Response:
        """Send a request and return when the headers of its answer are there.

        ``first_byte_s`` and ``stall_s`` take the place of the pool's own; all of the answer has to be there after
        ``whole_s``, if that is not 0. ``is_fresh`` asks for a new connection. Cancelling closes the connection.

        Raises:
            ConnectError: the node could not be reached.
            ConnectionLostError: it closed a fresh connection without a byte.
            StaleConnectionError: it closed a kept one, and ``tells_stale``.
            PoolFullError: all connections are in use.
            UpstreamTimeoutError: it stayed silent.
            UpstreamError: it answered something that is not HTTP, or half a head.
            ValueError: a header has a line break.
        """
        if self._ended is not None:
            raise self._ended
        head = self.encode_head(method, target, headers)
        if first_byte_s is None:
            first_byte_s = self.timeouts.first_byte_s
        if stall_s is None:
            stall_s = self.timeouts.stall_s
        connection = None if is_fresh else self.idle_connection()
        if connection is not None:
            try:
                return await connection.ask(head, body, first_byte_s, stall_s, whole_s).begin()
            except StaleConnectionError:
                if tells_stale:
                    raise
        connection = await self._connect()
        return await connection.ask(head, body, first_byte_s, stall_s, whole_s).begin()

    def encode_head(self, method: bytes, target: bytes, headers: Sequence[Header]) -> bytes:
        """Return the head of a request to this node, but for its end. Raises ``ValueError`` for a line break in it."""
        return encode_head(method, self._prefix + target, self._host_lines, headers)

    def idle_connection(self) -> Connection | None:
        """Remove and return an idle connection; ``None`` if there is none."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_s < MAX_IDLE_S:
                return connection
            self._drop(connection)
        return None

    def _drop(self, connection: Connection) -> None:
        """Close a connection that was idle. Its callback comes later, and its place is free now."""
        self._open.discard(connection)
        connection.abort()

    def keep(self, connection: Connection) -> None:
        """Return a connection to the pool."""
        if self._closed:
            connection.abort()
        else:
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def retire(self) -> None:
        """Close idle connections and keep no other; running responses go on to their end."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    def close(self, error: ApiError | None = None) -> None:
        """Close every connection; running responses and later requests fail with ``error``."""
        self._closed = True
        self._ended = error or UpstreamError(f"The connection to {self.name} was closed.")
        for connection in tuple(self._open):
            connection.fail(self._ended)

    async def _connect(self) -> Connection:
        if self.num_connections >= self._max_connections and self._idle:
            self._drop(self._idle.pop(0))  # a fresh connection is asked for: it takes the place of one that waits
        if self.num_connections >= self._max_connections:
            raise PoolFullError(f"All {self._max_connections} connections to {self.name} are in use.", retry_after_s=1)
        self._connecting += 1
        loop = asyncio.get_running_loop()
        connection = Connection(self, loop)
        try:
            async with asyncio.timeout(self.timeouts.connect_s):
                await loop.create_connection(
                    lambda: cast(asyncio.Protocol, connection), self._host, self._port, ssl=self._tls
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
