"""An exchange that notes what passes through it, and an exchange as it was noted.

What a client is sent goes out first and is noted then; beyond its limit of bytes nothing more is noted.
"""

import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from cortex._fast.response_writer import Writer
from cortex.http_io import Exchange, Header
from cortex.wire.headers import REQUEST_ID

NOTED_HEADERS = (
    "accept",
    "accept-encoding",
    "anthropic-beta",
    "anthropic-version",
    "content-encoding",
    "content-type",
    "idempotency-key",
    "openai-beta",
    "originator",
    "session_id",
    "user-agent",
    "x-app",
    "x-claude-code-session-id",
    "x-stainless-lang",
    "x-stainless-package-version",
    "x-stainless-retry-count",
    "x-stainless-timeout",
    REQUEST_ID.decode(),
)
"""Headers that are noted. All others are left out: any may be a secret."""


class Captured(msgspec.Struct, kw_only=True):
    """A request and its answer. Times are seconds after ``at``, which is Unix time."""

    id: str
    key: str
    at: float
    method: str
    path: str
    headers: dict[str, str]
    body: str = ""
    status: int = 0
    """HTTP status; 0 if the client disconnected before it."""
    answer_headers: dict[str, str] = {}
    answer: list[tuple[float, str]] = []
    """Pieces of the answer, each with its time: SSE events as they were written, or the whole of a reply."""
    ended_s: float = 0.0
    is_cut: bool = False
    """Whether there was more than the capture has room for."""
    record: dict[str, Any] = {}
    """Fields of its log line: model, node, tokens, times."""


class CapturedExchange(Exchange):
    """Exchange that passes everything on to another one. ``captured`` is what it has noted."""

    def __init__(self, inner: Exchange, key: str, room_bytes: int) -> None:
        super().__init__(inner.method, inner.path, inner.query, inner.client, inner.request_id)
        self._inner = inner
        self._room_bytes = room_bytes
        self._begun_s = time.monotonic()
        self.caller, self.loop, self.origin = inner.caller, inner.loop, inner.origin
        self.body_timeout_s, self.is_alone, self.is_last = inner.body_timeout_s, inner.is_alone, inner.is_last
        self.extra_headers = inner.extra_headers
        headers = {name: value.decode("latin-1") for name in NOTED_HEADERS if (value := inner.header(name.encode()))}
        self.captured = Captured(
            id=inner.request_id, key=key, at=time.time(), method=inner.method, path=inner.path, headers=headers
        )

    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name, or ``None``."""
        return self._inner.header(name)

    async def read_body(self, limit_bytes: int) -> bytes:
        """Return the whole body. Raises as :meth:`Exchange.read_body` does."""
        try:
            body = await self._inner.read_body(limit_bytes)
        finally:
            self.is_last = self._inner.is_last
        self.captured.body = self._note(body)
        return body

    async def _read(self, declared: int | None, limit_bytes: int) -> bytes:
        return await self._inner._read(declared, limit_bytes)

    async def reply(
        self, status: int, body: bytes, *, content_type: bytes = b"application/json", headers: Sequence[Header] = ()
    ) -> None:
        """Send a complete response."""
        self._begin_answer(status, ((b"content-type", content_type), *headers))
        await self._inner.reply(status, body, content_type=content_type, headers=headers)
        self._note_answer(body)

    async def start_stream(self, headers: Sequence[Header] = ()) -> None:
        """Send status 200 and the headers of an event stream."""
        self._begin_answer(200, headers)
        await self._inner.start_stream(headers)

    async def write(self, data: bytes) -> None:
        """Send some bytes of a started stream; return when more may be sent."""
        self._note_answer(data)  # its time is that of the event, not of the client's reading it
        await self._inner.write(data)

    def start_now(self, headers: Sequence[Header] = ()) -> Writer:
        """Send status 200 and the headers of an event stream; return its writer."""
        self._begin_answer(200, headers)
        return _CapturedWriter(self._inner.start_now(headers), self._note_answer)

    async def finish(self) -> None:
        """End a started stream."""
        await self._inner.finish()

    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the client disconnects; return a function that ends the watch."""
        return self._inner.on_disconnect(callback)

    def end(self) -> Captured:
        """Return what was noted, at the end of the exchange."""
        self.captured.ended_s = self._elapsed_s()
        return self.captured

    def _begin_answer(self, status: int, headers: Sequence[Header]) -> None:
        self._inner.is_last = self.is_last
        self.status = self.captured.status = status
        sent = {**dict(headers), **self.extra_headers}
        self.captured.answer_headers = {name.decode(): value.decode("latin-1") for name, value in sent.items()}

    def _note_answer(self, data: bytes) -> None:
        if data and (text := self._note(data)):
            self.captured.answer.append((self._elapsed_s(), text))

    def _note(self, data: bytes) -> str:
        """Return bytes as text, as far as there is room."""
        noted = data[: self._room_bytes]
        self._room_bytes -= len(noted)
        self.captured.is_cut = self.captured.is_cut or len(noted) < len(data)
        return noted.decode(errors="replace")

    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self._begun_s, 6)


class _CapturedWriter(Writer):
    """Writer that notes what it passes on to another one, at the time of the event."""

    def __init__(self, inner: Writer, note: Callable[[bytes], None]) -> None:
        self._inner = inner
        self._note = note

    def write(self, data: bytes) -> Coroutine[Any, Any, None] | None:
        self._note(data)
        pause = self._inner.write(data)
        self.written_at = self._inner.written_at
        return pause
