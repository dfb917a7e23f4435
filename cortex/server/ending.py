"""Graceful shutdown of a gateway process after SIGTERM, without losing a request that has reached it.

First it stops accepting, so that it drops no connection; if the socket is shared (by systemd, or by another gateway),
its other owner accepts the connections in its queue. Then it serves the requests that still arrive on its connections,
each with ``connection: close``, until no connection is left or nothing has arrived for a moment. Only then the server
is stopped. An answer that takes longer than the limit ends with an error of its dialect.

A server that is stopped at once closes connections that were accepted and not yet read, and kept-alive connections
whose next request is on its way: with 24 clients and ten restarts, that lost 11 requests of 19,635 on fresh
connections, and 119 of 40,303 on kept-alive ones.
"""

import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger("cortex")

QUIET_S = 1.0
"""Silence after which the remaining connections are closed; a request sent at that moment is lost."""
SETTLE_S = 0.05
"""Time until a connection that was being accepted as the socket was replaced is counted."""
FLUSH_S = 2.0
"""Time for answers that are ended to send their error."""
CHECK_INTERVAL_S = 0.05
ESTABLISHED = "01"


class Ending:
    """The shutdown of one process: ``has_begun`` after SIGTERM, and the count of requests that it waits for."""

    def __init__(
        self,
        limit_s: float,
        keep_listening: Iterable[int],
        end_requests: Callable[[], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """``keep_listening`` are ports that are not for clients; ``end_requests`` ends running requests at the limit.

        ``prepare`` is called as the shutdown begins, to end answers that never end by themselves.
        """
        self._prepare = prepare
        self._limit_s = limit_s
        self._ports = frozenset(keep_listening)
        self._end_requests = end_requests
        self._task: asyncio.Task[None] | None = None
        self.has_begun = False
        self.num_running = 0
        self.last_at = 0.0
        """Time of the last start or end of a request, by ``time.monotonic``."""

    def listen_to_signals(self) -> None:
        """Begin on SIGTERM, in place of the server, which is then stopped by SIGINT.

        The handler is Python's own: uvloop forgets a signal that comes while it does not run, and the server runs it
        once to start and once more to serve. A worker that got SIGTERM in between would never end.
        """
        loop = asyncio.get_running_loop()
        # Only in the main thread: tests embed servers in others.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(self.begin))

    def begin(self) -> None:
        """Begin the shutdown; further calls do nothing."""
        if self.has_begun:
            return
        self.has_begun = True
        self._prepare()
        self._task = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        try:
            await self._wait()
        except Exception:  # the process has to end in any case
            log.exception("ending at once")
        os.kill(os.getpid(), signal.SIGINT)

    async def _wait(self) -> None:
        log.info("ending", extra={"fields": {"running": self.num_running}})
        begun = time.monotonic()
        ports = stop_accepting(self._ports)
        await asyncio.sleep(SETTLE_S)
        while num_connections(ports):
            now = time.monotonic()
            if not self.num_running and now - max(self.last_at, begun) >= QUIET_S:
                break
            if now - begun >= self._limit_s:
                log.warning("ending requests", extra={"fields": {"running": self.num_running}})
                self._end_requests()
                await self._flush()
                break
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def _flush(self) -> None:
        for _ in range(round(FLUSH_S / CHECK_INTERVAL_S)):
            if not self.num_running:
                return
            await asyncio.sleep(CHECK_INTERVAL_S)


def stop_accepting(keep: frozenset[int]) -> frozenset[int]:
    """Replace every listening TCP socket of this process by a socket without clients.

    Returns the ports of these sockets, except the ports to ``keep``, which stay as they are.

    The server keeps its descriptors, and finds nothing to accept. It has no call that stops it from accepting and keeps
    its connections.
    """
    silent = socket.socket(socket.AF_UNIX)
    silent.setblocking(False)
    silent.bind("")
    silent.listen(1)
    ports: set[int] = set()
    for fd in _descriptors():
        port = _listening_port(fd)
        if port is not None and port not in keep:
            os.dup2(silent.fileno(), fd, inheritable=False)
            ports.add(port)
    silent.close()
    return frozenset(ports)


def num_connections(ports: frozenset[int]) -> int:
    """Return the number of this process's open connections at its own ``ports``."""
    own: set[str] = set()
    for fd in _descriptors():
        with contextlib.suppress(OSError):
            own.add(os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").removesuffix("]"))  # noqa: PTH115
    found = 0
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(OSError):
            for row in pathlib.Path(table).read_text().splitlines()[1:]:
                columns = row.split()
                is_here = int(columns[1].rpartition(":")[2], 16) in ports
                found += is_here and columns[3] == ESTABLISHED and columns[9] in own
    return found


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208


def server_addresses() -> list[tuple[str, int]]:
    """Return host and port of every TCP socket of this process that listens, or on which its server will listen."""
    found = {bound[0] for fd in _descriptors() if (bound := _bound(fd)) is not None}
    return sorted(found)


def _listening_port(fd: int) -> int | None:
    """Return the port at which a descriptor listens, if it does."""
    bound = _bound(fd)
    return bound[0][1] if bound is not None and bound[1] else None


def _bound(fd: int) -> tuple[tuple[str, int], bool] | None:
    """Return the address of a TCP socket that is no connection, and whether it listens already."""
    try:
        duplicate = os.dup(fd)
    except OSError:
        return None
    try:
        copy = socket.socket(fileno=duplicate)
    except OSError:  # it is no socket, and its copy has no other owner
        os.close(duplicate)
        return None
    with copy:
        try:
            if copy.family not in {socket.AF_INET, socket.AF_INET6} or copy.type != socket.SOCK_STREAM:
                return None
            listens = bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            address: tuple[Any, ...] = copy.getsockname()
        except OSError:
            return None
        if not listens:
            with contextlib.suppress(OSError):
                copy.getpeername()
                return None
    return ((str(address[0]), int(address[1])), listens) if address[1] else None
