"""``app``: the gateway as one object for every server interface, for ``granian cortex.asgi:app``.

Granian's own interface, RSGI, calls ``__rsgi__`` and its init and del; ASGI (with or without a lifespan) calls the
object. Responses are the same, over HTTP/1 and HTTP/2; RSGI costs less a request, and ``cortex serve`` uses it. The
paths are :mod:`cortex.gateway`'s. Each worker process has an ``app`` of its own, with its own view of the fleet.
"""

import asyncio
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from cortex import worker_signals  # noqa: F401 - first: the others take long to import
from cortex._fast.response_writer import WriteCoalescer
from cortex._fast.watches import Watches
from cortex.asgi_io import AsgiHead, AsgiProtocol
from cortex.endpoints import reply_error
from cortex.errors import NotStartedError
from cortex.fast_path import FastPathRules
from cortex.http_io import AsgiExchange, Receive, Scope, Send, find_header
from cortex.rsgi_io import HTTP_2, RsgiExchange, RsgiSocket
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
        self._is_open = False

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
        self._watches = Watches(loop)
        self._coalescer = WriteCoalescer(loop)
        self._fast_path = FastPathRules(self.gateway, self.ending, self._watches, flushes=False).fast_path

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        """Serve one request or WebSocket."""
        if scope.proto != "http":
            socket = RsgiSocket(scope, protocol)
            try:
                await self.gateway.handle_socket(socket.scope, socket.receive, socket.send)
            finally:
                socket.end()
            return
        self._coalescer.bypass()
        if scope.http_version == HTTP_2:  # what its connection is sent has to be counted, which the fast path does not
            exchange = RsgiExchange(scope, protocol, self._watches, self._coalescer, None)
            await self.handle(exchange, may_be_last=False)
            return
        fast_request = self._fast_path.begin(scope, protocol)
        if fast_request is None or not await fast_request.answer():
            await self.handle(RsgiExchange(scope, protocol, self._watches, self._coalescer, fast_request))

    # ------------------------------------------------------------------ ASGI

    def __call__(self, scope: Any, receive: Any, send: Any = None) -> Any:
        """Serve one scope. Called with two arguments, as WSGI does, say that this is no WSGI application."""
        return _refuse_wsgi(receive) if send is None else self._serve(scope, receive, send)

    # Servers check for a coroutine function, to distinguish this ASGI from an older one.
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(__call__)
    else:
        vars(__call__)["_is_coroutine"] = vars(asyncio.coroutines)["_is_coroutine"]

    def open_asgi(self, loop: asyncio.AbstractEventLoop) -> None:
        """Accept ASGI requests on this loop."""
        self._fast_path = FastPathRules(self.gateway, self.ending, Watches(loop), flushes=True).fast_path
        self._is_open = True

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(receive, send)
            return
        if kind not in _OPENS_AT_REQUEST:
            raise NotImplementedError(f"scope type {kind}")
        if not self._is_open and not await self._opens(scope, receive, send):
            return
        if kind == "websocket":
            await self.gateway.handle_socket(scope, receive, send)
            return
        fast_request = self._fast_path.begin(
            AsgiHead(scope), AsgiProtocol(receive, send, self.gateway.settings.gateway.body_timeout_s)
        )
        if fast_request is None:
            given = find_header(scope["headers"], REQUEST_ID)
            exchange = AsgiExchange(scope, receive, send, request_id=request_id_of(given))
        elif await fast_request.answer():
            return
        else:
            exchange = AsgiExchange(scope, receive, send, request_id=fast_request.record.request_id)
            exchange.fast_request, exchange.known_body = fast_request, fast_request.error or fast_request.body
        await self.handle(exchange, may_be_last=scope.get("http_version") != HTTP_2)

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
        self.open_asgi(asyncio.get_running_loop())


def _refuse_wsgi(start_response: Callable[[str, list[tuple[str, str]]], object]) -> list[bytes]:
    """Answer as a WSGI application."""
    log.error("%s", NO_WSGI.strip())
    start_response("500 Internal Server Error", [("content-type", "text/plain; charset=utf-8")])
    return [NO_WSGI.encode()]


app = Application()
