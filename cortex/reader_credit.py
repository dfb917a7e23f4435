"""How much a stream may still be sent, by what its reader's host has acknowledged.

For servers that queue without limit and tell nothing, as Granian does over RSGI. The kernel knows how many bytes of a
connection have been acknowledged (``TCP_INFO``), and the connection is one of this process's: it is found by its two
addresses. What has been sent since the first look, less what has been acknowledged since, is more than what can be
queued. A stream shorter than ``FREE_BYTES`` is never looked at, and that is nearly every one; a longer one costs a
system call for each ``WINDOW_BYTES`` and, while its reader stalls, a look every now and then.

What is sent is counted with its framing: exactly for HTTP/1.1 in the clear, and never too low over TLS. Should the
count have run ahead of the truth, a connection whose send buffer has been empty twice in a row while nothing was sent
shows that nothing is queued. That holds for one stream a connection: not over HTTP/2.
"""

import asyncio
import contextlib
import fcntl
import pathlib
import socket
import struct
import termios
from collections.abc import Iterator

from cortex._fast.outlet import Outlet
from cortex.http_io import ClientDisconnectedError

FREE_BYTES = 64 * 1024
"""What every stream may be sent before anybody looks."""

WINDOW_BYTES = 128 * 1024
"""The most that may be sent and not acknowledged, kernel buffers included."""

RESUME_BYTES = 96 * 1024
"""How much of that is left when more is sent: not after every acknowledgement."""

FIRST_LOOK_S = 0.002
LAST_LOOK_S = 0.25
"""How soon a reader that has fallen behind is looked at again: at first, and when it has stalled for long."""

_TCP_INFO_BYTES = 192
_ACKED_OFFSET = 120
"""Of ``tcpi_bytes_acked`` in Linux's ``struct tcp_info``."""


class Credit:
    """What one stream may be sent. ``client`` and ``server`` are the connection's addresses, as ``host:port``."""

    __slots__ = ("_acked_before", "_client", "_fd", "_server_port")

    def __init__(self, client: str, server: str) -> None:
        self._client = client
        self._server_port = int(server.rpartition(":")[2])
        self._acked_before: int | None = None
        """What had been acknowledged when nothing of this stream had been, or more than that."""
        self._fd = -1

    async def more(self, outlet: Outlet) -> None:
        """Return when the reader has read enough to be sent more, and say how much.

        Raises:
            ClientDisconnectedError: its connection is gone.
        """
        pause_s = FIRST_LOOK_S
        was_empty = False
        while True:
            acked, num_queued = self._look()
            if self._acked_before is None:
                self._acked_before = acked
            elif was_empty and not num_queued:
                self._acked_before = acked - outlet.sent_bytes
            outstanding = outlet.sent_bytes - (acked - self._acked_before)
            if outstanding <= RESUME_BYTES:
                outlet.limit_bytes = outlet.sent_bytes + WINDOW_BYTES - outstanding
                return
            was_empty = not num_queued
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_LOOK_S)

    def _look(self) -> tuple[int, int]:
        """Return how many bytes the reader's host has acknowledged, and how many it has yet to."""
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


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """Give the server's own socket for a moment: a copy would keep the connection open when the server closes it."""
    connection = socket.socket(fileno=fd)
    try:
        yield connection
    finally:
        connection.detach()


def _addresses(connection: socket.socket) -> tuple[str, int]:
    """Return the peer as Granian writes it, and our own port."""
    host, port, *rest = connection.getpeername()
    if connection.family == socket.AF_INET6:
        plain, _, zone = host.partition("%")
        host = f"[{plain}%{rest[1]}]" if zone else f"[{plain}]"
    return f"{host}:{port}", connection.getsockname()[1]


_known: dict[tuple[str, int], int] = {}
"""Where each connection was when all of them were last looked through."""


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
