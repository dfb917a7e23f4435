"""``app``: the gateway as one object for every server interface, for ``granian cortex.asgi:app``.

Granian's own interface, RSGI, calls ``__rsgi__`` and its init and del; ASGI (with or without a lifespan) calls the
object. Responses are the same, over HTTP/1 and HTTP/2; RSGI costs less a request, and ``cortex serve`` uses it. The
paths are :mod:`cortex.gateway`'s. Each worker process has an ``app`` of its own, with its own view of the fleet.
"""

import asyncio
import inspect
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from cortex._fast.response_writer import WriteCoalescer
from cortex._fast.watches import Watches
from cortex.endpoints import reply_error
from cortex.errors import NotStartedError
from cortex.http_io import AsgiExchange, Receive, Scope, Send, find_header
from cortex.server import worker_signals  # noqa: F401 - first: the others take long to import
from cortex.server.rsgi_io import RsgiExchange, RsgiSocket
from cortex.settings import ConfigError
from cortex.wire.headers import REQUEST_ID, request_id_of
from cortex.worker import Worker

log = logging.getLogger("cortex")

NO_WSGI = (
    "cortex.asgi:app streams, and WSGI cannot: it is served by RSGI or ASGI. "
    "Leave out --interface wsgi, or name asgi instead.\n"
)
_OPENS_AT_REQUEST = frozenset({"http", "websocket"})


class Application(Worker):
    """Application for both interfaces."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(*(() if environment is None else (environment,)))
        self._starting: asyncio.Task[None] | None = None
        self.is_open = False
        """Whether ASGI requests are accepted without a start of their own."""

    # ------------------------------------------------------------------ RSGI

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start, before anything is accepted."""
        try:
            loop.run_until_complete(self.start())
        except ConfigError as error:
            log.error("cortex: %s", error)
            sys.exit(1)
        self.open_rsgi(loop)

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        """End; requests have ended by then."""
        loop.run_until_complete(self.stop())

    def open_rsgi(self, loop: asyncio.AbstractEventLoop) -> None:
        """Accept RSGI requests on this loop."""
        self.watches = Watches(loop)
        self._coalescer = WriteCoalescer(loop)

    def __rsgi__(self, scope: Any, protocol: Any) -> Coroutine[Any, Any, None]:
        """Return the coroutine that serves one request or WebSocket."""
        if scope.proto != "http":
            return self._serve_socket(RsgiSocket(scope, protocol))
        self._coalescer.bypass()
        return self.handle(RsgiExchange(scope, protocol, self.watches, self._coalescer))

    async def _serve_socket(self, socket: RsgiSocket) -> None:
        try:
            await self.gateway.handle_socket(socket.scope, socket.receive, socket.send)
        finally:
            socket.end()

    # ------------------------------------------------------------------ ASGI

    def __call__(self, scope: Any, receive: Any, send: Any = None) -> Any:
        """Serve one scope. Called with two arguments, as WSGI does, say that this is no WSGI application."""
        return _refuse_wsgi(receive) if send is None else self._serve(scope, receive, send)

    # Servers check for a coroutine function, to distinguish this ASGI from an older one.
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(__call__)
    else:
        vars(__call__)["_is_coroutine"] = vars(asyncio.coroutines)["_is_coroutine"]

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(receive, send)
            return
        if kind not in _OPENS_AT_REQUEST:
            raise NotImplementedError(f"scope type {kind}")
        if not self.is_open and not await self._opens(scope, receive, send):
            return
        if kind == "websocket":
            await self.gateway.handle_socket(scope, receive, send)
            return
        given = find_header(scope["headers"], REQUEST_ID)
        await self.handle(AsgiExchange(scope, receive, send, request_id=request_id_of(given)))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message: Mapping[str, Any] = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._start_asgi()
                except ConfigError as error:
                    await send({"type": "lifespan.startup.failed", "message": f"cortex: {error}"})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _opens(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Start for the first request of a server that has no lifespan; return whether that went well."""
        starting = self._starting
        if starting is None:
            starting = self._starting = asyncio.ensure_future(self._start_asgi())
        try:
            await asyncio.shield(starting)
        except Exception as error:
            if self._starting is starting:
                self._starting = None  # the next request tries it again: a file can be mended
                if isinstance(error, ConfigError):
                    log.error("cortex: %s", error)
                else:
                    log.exception("the gateway did not start")
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close"})
                return False
            refused = AsgiExchange(scope, receive, send, request_id=request_id_of(None))
            await reply_error(refused, NotStartedError("The gateway has not started; its log says why."))
            return False
        return True

    async def _start_asgi(self) -> None:
        await self.start()
        self.is_open = True


def _refuse_wsgi(start_response: Callable[[str, list[tuple[str, str]]], object]) -> list[bytes]:
    """Answer as a WSGI application."""
    log.error("%s", NO_WSGI.strip())
    start_response("500 Internal Server Error", [("content-type", "text/plain; charset=utf-8")])
    return [NO_WSGI.encode()]


app = Application()
