"""``app``: the gateway as an RSGI application, Granian's own interface, which costs less a request than ASGI.

``cortex serve`` runs this one; by hand it is ``granian --interface rsgi --http 1 --loop uvloop cortex.rsgi:app``. What
is answered is what :mod:`cortex.asgi` answers. Over HTTP/2 it answers nothing: several streams share a connection
there, and what a reader has read of one of them cannot be known (:mod:`cortex.reader_credit`).
"""

import asyncio
import logging
import sys
from typing import Any

from cortex._fast.outlet import Turns
from cortex._fast.watches import Watches
from cortex.express import Express
from cortex.rsgi_io import RsgiExchange, RsgiSocket
from cortex.settings import ConfigError
from cortex.worker import Worker

log = logging.getLogger("cortex")

HTTP_2 = "2"


class Application(Worker):
    """The RSGI callable. Granian starts and ends it with the worker process."""

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start, before anything is accepted."""
        try:
            loop.run_until_complete(self.start())
        except ConfigError as error:
            log.error("cortex: %s", error)
            sys.exit(1)
        self.open(loop)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take requests from now on, on this loop."""
        self._watches = Watches(loop)
        self._turns = Turns(loop)
        self._express = Express(self.gateway, self.ending, self._watches, flushes=False)

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        """End; requests have ended by then."""
        loop.run_until_complete(self.stop())

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        """Serve one request or WebSocket."""
        if scope.proto == "http":
            if scope.http_version == HTTP_2:
                protocol.response_str(505, [("content-type", "text/plain")], "HTTP/2 is not spoken here; use HTTP/1.1.")
                return
            self._turns.hurry()
            trip = self._express.way.begin(scope, protocol)
            if trip is None or not await trip.answer():
                await self.handle(RsgiExchange(scope, protocol, self._watches, self._turns, trip))
        else:
            socket = RsgiSocket(scope, protocol)
            try:
                await self.gateway.handle_socket(socket.scope, socket.receive, socket.send)
            finally:
                socket.end()


app = Application()
