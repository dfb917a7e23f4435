"""The event stream behind the page: the whole state once, then the changes once a second.

Its rate is bounded by the clock, not by the fleet: there is one SSE event a second, made once, with the same bytes for
every viewer. A viewer that reads too slowly gets the whole state again; there is no queue per viewer. Without viewers
only the points of the charts are made.
"""

import asyncio
import pathlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from cortex import __version__
from cortex.capture.capture import Capture
from cortex.dashboard.journal import Entry, Journal
from cortex.dashboard.log_tail import LogTail
from cortex.dashboard.rates import SERIES, Point, Rates
from cortex.dashboard.view import Tree, catalogue_tree, difference, node_tree
from cortex.errors import GatewayStoppedError
from cortex.event_stream import stream
from cortex.fleet.service import FleetService
from cortex.fleet.state import Node
from cortex.http_io import Exchange
from cortex.settings import ConfigError
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError, OverloadedError

INTERVAL_S = 1.0
RECENT_REQUESTS = 100
"""Number of requests that are sent to a page that opens; an SSE event has at most half as many new ones."""
RECENT_LINES = 256
"""Number of lines of the log that are sent to a page that opens; an SSE event has at most half as many new ones."""
KEPT_SSE_EVENTS = 20
"""Number of SSE events, one a second, that a viewer may be behind before it gets the whole state again."""
MAX_VIEWERS = 64
HEARTBEAT = b": keep-alive\n\n"
LAST_WORD = b"event: bye\ndata: {}\n\n"


class Feed:
    """The event stream of one gateway process, for all viewers."""

    def __init__(
        self,
        service: FleetService,
        config_error: Callable[[], ConfigError | None],
        may_watch: Callable[[Exchange], None],
        build: str,
        folder: pathlib.Path | None = None,
        supervisor: Supervisor | None = None,
        capture: Capture | None = None,
    ) -> None:
        """``may_watch`` raises if an exchange may not watch, and is called every second. ``build`` is the files' hash.

        In ``folder`` the workers of a gateway share the requests that have ended, and the latest lines of their logs.
        """
        self.journal = Journal(folder)
        self._log = LogTail(folder)
        self._supervisor = supervisor or Supervisor()
        self._capture = capture or Capture()
        self._service = service
        self._config_error = config_error
        self._may_watch = may_watch
        self._build = build
        self._rates = Rates()
        self._recent: deque[Entry] = deque(maxlen=RECENT_REQUESTS)
        self._lines: deque[str] = deque(maxlen=RECENT_LINES)
        self._trees: dict[str, tuple[Node, Tree]] = {}
        self._state: Tree = {}
        self._sse_events: deque[bytes] = deque(maxlen=KEPT_SSE_EVENTS)
        self._number = 0
        """Number of the latest SSE event."""
        self._ticked = asyncio.Event()
        self._ticked_at = time.monotonic()
        self._num_viewers = 0
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._encode = msgspec.json.Encoder().encode

    def start(self) -> None:
        """Start to make an SSE event each second."""
        self._log.start()
        self._task = self._supervisor.start("dashboard", self._run)

    def close(self) -> None:
        """End the stream of every viewer, so that the end of this process does not wait for them."""
        self._closed = True
        self._wake()

    async def stop(self) -> None:
        """Stop making SSE events."""
        self.close()
        self._log.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def events(self, exchange: Exchange) -> None:
        """``GET /admin/events``."""
        if exchange.method == "HEAD":
            await exchange.reply(200, b"", content_type=b"text/event-stream; charset=utf-8")
            return
        if self._closed:
            raise GatewayStoppedError("The gateway is stopping.", retry_after_s=1)
        if self._num_viewers >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} dashboards are open at this gateway already.", retry_after_s=30)
        self._num_viewers += 1
        try:
            await stream(exchange, self._follow(exchange), heartbeat=HEARTBEAT, error_event=self._refusal)
        finally:
            self._num_viewers -= 1

    def tick(self) -> None:
        """Read the fleet, and make an SSE event of the changes if there are viewers."""
        now = time.monotonic()
        ended = self.journal.read()
        nodes = self._service.fleet.state.nodes
        point = self._rates.take(time.time(), nodes, ended, now - self._ticked_at)
        self._ticked_at = now
        self._recent.extend(ended.entries)
        lines = self._log.read()
        self._lines.extend(lines)
        if not self._num_viewers:
            self._state = {}
            self._trees.clear()
            return
        before, self._state = self._state, self._fleet_tree()
        changes: Tree = {"point": point}
        if ended.entries:
            changes["requests"] = ended.entries[-RECENT_REQUESTS // 2 :]
        if lines:
            changes["log"] = lines[-RECENT_LINES // 2 :]
        if patch := difference(before, self._state):
            changes["patch"] = patch
        self._number += 1
        self._sse_events.append(b"event: tick\ndata: " + self._encode(changes) + b"\n\n")
        self._wake()

    async def _run(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(INTERVAL_S)

    async def _follow(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Yield SSE events until the viewer may not watch any more, or this process ends."""
        position = self._number
        yield self._whole()
        while not self._closed:
            await self._ticked.wait()
            self._may_watch(exchange)  # keys change while a page is open
            behind = self._number - position
            position = self._number
            if behind > len(self._sse_events):
                yield self._whole()
            elif behind:
                yield b"".join(list(self._sse_events)[-behind:])
        yield LAST_WORD

    def _whole(self) -> bytes:
        """Return the SSE event of the whole state, as of the latest SSE event."""
        if not self._state:
            self._state = self._fleet_tree()
        points: list[Point] = list(self._rates.points)
        whole: dict[str, Any] = {
            "version": __version__,
            "build": self._build,
            "interval_s": INTERVAL_S,
            "series": SERIES,
            "points": points,
            "requests": list(self._recent),
            "log": list(self._lines),
            "state": self._state,
        }
        return b"event: whole\ndata: " + self._encode(whole) + b"\n\n"

    def _fleet_tree(self) -> Tree:
        """Return the fleet as a tree; the subtree of a node that has not changed is reused."""
        state = self._service.fleet.state
        in_flight = self._service.fleet.in_flight.by_node
        nodes: Tree = {}
        for name, node in state.nodes.items():
            known = self._trees.get(name)
            if known is None or known[0] is not node:
                known = self._trees[name] = node, node_tree(node)
            nodes[name] = {
                **known[1],
                "in_flight": in_flight.get(name, 0),
                "tokens_per_s": round(self._rates.tokens_per_s.get(name, 0.0), 1),
            }
        for name in self._trees.keys() - nodes.keys():
            del self._trees[name]
        error = self._config_error()
        capturing = None if self._capture.key is None else self._capture.state
        return {
            "capture": {} if capturing is None else {"key": capturing.key, "until": capturing.until},
            "config_error": "" if error is None else str(error),
            "nodes": nodes,
            "models": catalogue_tree(self._service.catalogue, state.nodes),
        }

    def _refusal(self, error: ApiError) -> bytes:
        return b"event: refused\ndata: " + self._encode({"message": error.message, "status": error.status}) + b"\n\n"

    def _wake(self) -> None:
        ticked, self._ticked = self._ticked, asyncio.Event()
        if self._closed:
            self._ticked.set()
        ticked.set()
