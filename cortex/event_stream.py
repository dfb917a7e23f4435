"""Event streams over an HTTP exchange: held-back headers, heartbeats, errors.

Headers are held back for a moment so that an early failure keeps its HTTP status; then they are sent, and heartbeats
fill every silence. Heartbeats and errors are given as bytes, in the dialect's form.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any

from cortex._fast.response_writer import Writer
from cortex.http_io import ClientDisconnectedError, EndedByDisconnect, Exchange, Header
from cortex.wire.errors import ApiError

HOLD_HEADERS_S = 0.3
"""Time for which a stream's headers wait for its first bytes; clients need them within a second."""

HEARTBEAT_INTERVAL_S = 5.0
"""Longest silence on a stream; intermediaries have been seen to cut at 60 s and agents to warn at 20 s."""


async def stream(
    exchange: Exchange,
    chunks: AsyncGenerator[bytes, None],
    *,
    heartbeat: bytes | Callable[[], bytes],
    error_event: Callable[[ApiError], bytes],
    hold_share: float = 1.0,
) -> None:
    """Send an event stream of ``chunks``, each of whole SSE events, as :func:`serve_stream` does.

    ``chunks`` is always closed before the stream is.
    """

    async def write(out: EventStream) -> None:
        async with aclosing(chunks):
            async for chunk in chunks:
                await out.write(chunk)

    await serve_stream(exchange, write, heartbeat=heartbeat, error_event=error_event, hold_share=hold_share)


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
        self.writer: Writer | None = None
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

        A disconnect is raised by that coroutine, and reported by :meth:`Exchange.on_disconnect`.
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
        with suppress(ClientDisconnectedError):  # reported by on_disconnect
            pause = self.write_now(beat)
            if pause is not None:  # the client has not read what was sent; the next chunk waits for it
                pause.close()
