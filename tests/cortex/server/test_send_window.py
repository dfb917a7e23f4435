"""Send windows follow the kernel's acknowledgements, over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cortex._fast.response_writer import ResponseWriter, WriteCoalescer
from cortex.http_io import ClientDisconnectedError
from cortex.server.send_window import FREE_BYTES, WINDOW_BYTES, SendWindow

PIECE = bytes(1024)


class Line:
    """Connection with an end that writes without limit, as Granian does, and an end that reads on demand."""

    def __init__(self, writing: socket.socket, reading: socket.socket) -> None:
        self.writing = writing
        self.reading = reading
        self.queue = b""
        self.sent_bytes = 0
        host, port = writing.getpeername()[:2]
        at = f"[{host}]" if ":" in host else host
        self.window = SendWindow(f"{at}:{port}", f"{at}:{writing.getsockname()[1]}")
        self.writer = ResponseWriter(
            self.queue_up, self.window.extend, FREE_BYTES, WriteCoalescer(asyncio.get_running_loop()), is_tls=False
        )

    def push(self) -> bool:
        """Send one piece; return whether to wait."""
        pause = self.writer.write(PIECE)
        if pause is not None:
            pause.close()
        return pause is not None

    def queue_up(self, data: bytes) -> None:
        """Take a piece, as Granian does."""
        self.sent_bytes += len(data)
        self.queue += data
        self.pump()

    def pump(self) -> None:
        """Write what the kernel takes."""
        try:
            while self.queue:
                self.queue = self.queue[self.writing.send(self.queue) :]
        except BlockingIOError:
            pass

    def read(self) -> None:
        """Read all that is there."""
        self.pump()
        try:
            while self.reading.recv(1 << 16):
                self.pump()
        except BlockingIOError:
            pass

    async def push_until_stopped(self, limit_bytes: int) -> bool:
        """Send without a read; return whether the window stopped it before so much was sent."""
        while self.sent_bytes < limit_bytes:
            if self.push():
                try:
                    async with asyncio.timeout(0.2):
                        await self.window.extend(self.writer)
                except TimeoutError:
                    return True
        return False


@asynccontextmanager
async def line(host: str = "127.0.0.1") -> AsyncIterator[Line]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener, socket.socket(family) as reading:
        reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reading.connect(listener.getsockname()[:2])
        reading.setblocking(False)
        writing, _ = listener.accept()
        with writing:
            writing.setblocking(False)
            yield Line(writing, reading)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_reader_that_stalls_stops_the_writer_and_starts_it_again(host: str) -> None:
    async with line(host) as one:
        assert await one.push_until_stopped(1 << 24)
        assert FREE_BYTES < one.sent_bytes < 2 * WINDOW_BYTES
        for _ in range(3):
            waiting = asyncio.ensure_future(one.window.extend(one.writer))
            async with asyncio.timeout(10):
                while not waiting.done():
                    one.read()
                    await asyncio.sleep(0.001)
            await waiting
            before = one.sent_bytes
            assert await one.push_until_stopped(1 << 24)
            assert one.sent_bytes - before < 2 * WINDOW_BYTES


async def test_a_reader_that_reads_is_never_waited_for_long() -> None:
    async with line() as one, asyncio.timeout(10):
        while one.sent_bytes < 1 << 22:
            waits = one.push()
            one.read()
            if waits:
                await one.window.extend(one.writer)


async def test_short_streams_are_not_looked_at() -> None:
    coalescer = WriteCoalescer(asyncio.get_running_loop())
    writer = ResponseWriter(
        lambda data: None, SendWindow("203.0.113.1:1", "203.0.113.2:2").extend, FREE_BYTES, coalescer, is_tls=True
    )
    assert not any(writer.write(bytes(200)) for _ in range(200))


async def test_a_connection_that_is_gone_is_a_client_that_left() -> None:
    async with line() as one:
        assert await one.push_until_stopped(1 << 24)
        one.writing.close()
        with pytest.raises(ClientDisconnectedError):
            await one.window.extend(one.writer)
