"""Adapters of an ASGI request for the fast path (:mod:`cortex._fast.fast_path`).

All other requests use :class:`cortex.http_io.AsgiExchange`.
"""

import asyncio
from collections.abc import Iterable

from cortex.http_io import Header, Receive, Scope, Send, asgi_left, asgi_pieces, find_header
from cortex.request_body import WHOLE_BYTES, read_at_most


class AsgiHeaders:
    """Headers of a request by name, as text."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[Header]) -> None:
        self._pairs = pairs

    def get(self, name: str) -> str | None:
        """Return a header by its lower-case name, or ``None``."""
        value = find_header(self._pairs, name.encode())
        return None if value is None else value.decode("latin-1")


class AsgiHead:
    """Head of a request."""

    __slots__ = ("headers", "method", "path")

    def __init__(self, scope: Scope) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = AsgiHeaders(scope["headers"])


class AsgiProtocol:
    """Body of a request and its response, which is set first and sent by :meth:`flush`."""

    __slots__ = ("_answer", "_body_timeout_s", "_receive", "_send")

    def __init__(self, receive: Receive, send: Send, body_timeout_s: float) -> None:
        self._body_timeout_s = body_timeout_s
        self._receive = receive
        self._send = send
        self._answer: tuple[int, list[tuple[str, str]], bytes] = 500, [], b""

    async def __call__(self) -> bytes:
        """Return the whole body. Raises as :meth:`Exchange.read_body` does."""
        return await read_at_most(WHOLE_BYTES, asgi_pieces(self._receive), self._body_timeout_s)

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Set the response."""
        self._answer = status, headers, body

    async def flush(self) -> None:
        """Send the response."""
        status, texts, body = self._answer
        headers = [(name.encode(), value.encode("latin-1")) for name, value in texts]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def client_disconnect(self) -> "asyncio.Future[None]":
        """Return a future that is done when the client has disconnected."""
        return asyncio.ensure_future(asgi_left(self._receive))
