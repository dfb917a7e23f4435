"""Send windows of streams, by the acknowledgements of the client's host.

For servers that queue without limit, as Granian does over RSGI. The kernel counts the acknowledged bytes of a
connection (``TCP_INFO``), and the connection is a socket of this process, found by its two addresses. Bytes sent since
the first reading, less bytes acknowledged since, bound what is queued. Streams shorter than ``FREE_BYTES``, nearly all,
need no reading; a longer one costs a system call for each ``WINDOW_BYTES`` and, while its client stalls, a poll now and
then.

Bytes are counted with framing: exactly for HTTP/1.1 in the clear, never too low over TLS. Should the count be too high,
a connection whose send buffer was empty at two polls in a row, with nothing sent between, shows that nothing is queued.
That holds for one stream a connection.

Over HTTP/2 the streams of a connection share a window (:class:`SharedSendWindow`), as an acknowledgement cannot be
attributed to a stream. A stalled stream holds up the others of its connection once they are long, as HTTP/2's own
connection window does; never for longer than ``HOLD_S`` at a time.
"""

import asyncio
import contextlib
import fcntl
import pathlib
import socket
import struct
import termios
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from cortex._fast.response_writer import ResponseWriter
from cortex.http_io import ClientDisconnectedError

FREE_BYTES = 64 * 1024
"""Bytes that every stream may be sent before its connection is read."""

WINDOW_BYTES = 128 * 1024
"""Maximum of unacknowledged bytes, kernel buffers included."""

RESUME_BYTES = 96 * 1024
"""Unacknowledged bytes at which sending resumes: not after every acknowledgement."""

FREE_SHARED_BYTES = 256 * 1024
"""Bytes that a stream of an HTTP/2 connection may be sent before its shared window applies."""

HOLD_S = 5.0
"""Longest time for which the streams of an HTTP/2 connection wait while its host acknowledges nothing."""

MAX_UNREAD_BYTES = 4 * 1024 * 1024
"""Bytes that an HTTP/2 connection is sent beyond its window, after waits of ``HOLD_S``; then its streams are ended."""

FIRST_POLL_S = 0.002
MAX_POLL_S = 0.25
"""Interval of polls of a slow client: the first, and the longest."""

_TCP_INFO_BYTES = 192
_ACKED_OFFSET = 120
"""Offset of ``tcpi_bytes_acked`` in Linux's ``struct tcp_info``."""


class TcpAcknowledgements:
    """Kernel's counters of one connection. The addresses are ``host:port``."""

    __slots__ = ("_client", "_fd", "_server_port")

    def __init__(self, client: str, server: str) -> None:
        self._client = client
        self._server_port = int(server.rpartition(":")[2])
        self._fd = -1

    def read(self) -> tuple[int, int]:
        """Return how many bytes the client's host has acknowledged, and how many are in the send buffer.

        Raises:
            ClientDisconnectedError: the connection is closed.
        """
        if self._fd < 0:
            self._fd = _find(self._client, self._server_port)
        try:
            with _borrowed(self._fd) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                (num_queued,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4)))
                is_ours = _addresses(connection) == (self._client, self._server_port)
        except OSError:
            is_ours = False
        if not is_ours:
            raise ClientDisconnectedError
        acked: int = struct.unpack_from("Q", info, _ACKED_OFFSET)[0] if len(info) >= _ACKED_OFFSET + 8 else 0
        return acked, num_queued


class SendWindow:
    """Send window of one stream. ``client`` and ``server`` are the connection's addresses, as ``host:port``."""

    __slots__ = ("_acked_before", "_connection")

    def __init__(self, client: str, server: str) -> None:
        self._connection = TcpAcknowledgements(client, server)
        self._acked_before: int | None = None
        """Acknowledged bytes before any of this stream's, or more than that."""

    async def extend(self, writer: ResponseWriter) -> None:
        """Wait until the client has read enough, then raise the writer's limit.

        Raises:
            ClientDisconnectedError: the connection is closed.
        """
        pause_s = FIRST_POLL_S
        was_empty = False
        while True:
            acked, num_queued = self._connection.read()
            if self._acked_before is None:
                self._acked_before = acked
            elif was_empty and not num_queued:
                self._acked_before = acked - writer.sent_bytes
            outstanding = writer.sent_bytes - (acked - self._acked_before)
            if outstanding <= RESUME_BYTES:
                writer.limit_bytes = writer.sent_bytes + WINDOW_BYTES - outstanding
                return
            was_empty = not num_queued
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_POLL_S)


class SharedSendWindow:
    """Send window that the streams of one HTTP/2 connection share.

    Sent bytes are counted without framing and heads, so that the count is never too high and a reading client is never
    taken for a stalled one. The count starts anew when no exchange of the connection is left.
    """

    __slots__ = ("__weakref__", "_acked_before", "_connection", "_excess_bytes", "_sent_bytes")

    def __init__(self, client: str, server: str) -> None:
        self._connection = TcpAcknowledgements(client, server)
        self._acked_before: int | None = None
        """Acknowledged bytes at the beginning of the count; more, where others were acknowledged since."""
        self._sent_bytes = 0
        self._excess_bytes = 0

    @staticmethod
    def for_connection(client: str, server: str) -> "SharedSendWindow":
        """Return the window of a connection."""
        found = _shared.get((client, server))
        if found is None:
            found = _shared[client, server] = SharedSendWindow(client, server)
        return found

    def record_sent(self, size_bytes: int) -> None:
        """Count bytes that were sent."""
        if self._acked_before is not None:
            self._sent_bytes += size_bytes

    def for_stream(self) -> Callable[[ResponseWriter], Coroutine[Any, Any, None]]:
        """Return the function that extends one stream's limit, as :meth:`SendWindow.extend` does."""
        if self._acked_before is None:
            with contextlib.suppress(ClientDisconnectedError):
                self._acked_before = self._connection.read()[0]
        num_noted = 0

        async def extend(writer: ResponseWriter) -> None:
            nonlocal num_noted
            self.record_sent(writer.sent_bytes - num_noted)
            num_noted = writer.sent_bytes
            room_bytes = await self._wait()
            writer.limit_bytes = writer.sent_bytes + room_bytes

        return extend

    async def _wait(self) -> int:
        """Return how many bytes a stream may be sent, once that is more than 0.

        Raises:
            ClientDisconnectedError: the connection is closed, or its host has left too much unread.
        """
        pause_s, still_s, acked_last = FIRST_POLL_S, 0.0, -1
        while True:
            acked, _ = self._connection.read()
            if self._acked_before is None:
                self._acked_before = acked
            if acked > acked_last >= 0:
                still_s, self._excess_bytes = 0.0, max(0, self._excess_bytes - (acked - acked_last))
            acked_last = acked
            outstanding = self._sent_bytes - (acked - self._acked_before)
            if outstanding < 0:
                self._acked_before, outstanding = acked - self._sent_bytes, 0
            if outstanding <= RESUME_BYTES:
                return WINDOW_BYTES - outstanding
            if still_s >= HOLD_S:
                if self._excess_bytes >= MAX_UNREAD_BYTES:
                    raise ClientDisconnectedError
                self._excess_bytes += outstanding - RESUME_BYTES
                self._sent_bytes -= outstanding - RESUME_BYTES
                return WINDOW_BYTES - RESUME_BYTES
            await asyncio.sleep(pause_s)
            still_s += pause_s
            pause_s = min(2 * pause_s, MAX_POLL_S)


_shared: "weakref.WeakValueDictionary[tuple[str, str], SharedSendWindow]" = weakref.WeakValueDictionary()


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """Lend the server's own socket: a duplicate would keep the connection open after the server closes it."""
    connection = socket.socket(fileno=fd)
    try:
        yield connection
    finally:
        connection.detach()


def _addresses(connection: socket.socket) -> tuple[str, int]:
    """Return the peer in Granian's notation, and the local port."""
    host, port, *rest = connection.getpeername()
    if connection.family == socket.AF_INET6:
        plain, _, zone = host.partition("%")
        host = f"[{plain}%{rest[1]}]" if zone else f"[{plain}]"
    return f"{host}:{port}", connection.getsockname()[1]


_known: dict[tuple[str, int], int] = {}
"""File descriptor of each connection at the last scan."""


def _find(client: str, server_port: int) -> int:
    """Return the file descriptor of a connection; -1 if there is none."""
    key = (client, server_port)
    fd = _known.pop(key, -1)
    if fd >= 0 and _is(fd, key):
        return fd
    _known.clear()
    for entry in pathlib.Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), _borrowed(int(entry.name)) as connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                _known[_addresses(connection)] = int(entry.name)
    return _known.get(key, -1)


def _is(fd: int, key: tuple[str, int]) -> bool:
    try:
        with _borrowed(fd) as connection:
            return _addresses(connection) == key
    except OSError:
        return False
