"""The capture of a gateway: begun for one key by an administrator, ended by time, bytes, count or hand.

``key`` is ``None`` while nothing is captured, and a request costs that comparison. Workers share the state and the
requests through the shelf. Captured requests stay readable for ``KEEP_S`` after the end.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from cortex.access.keys import Principal
from cortex.capture.exchange import Captured, CapturedExchange
from cortex.capture.shelf import MemoryShelf, Shelf
from cortex.http_io import Exchange
from cortex.request_log import Line

log = logging.getLogger("cortex.capture")

MAX_REQUESTS = 1000
KEEP_S = 3600.0
PUT_AFTER_S = 0.2
"""Time after a request's end until it is put on the shelf; its log line is written meanwhile."""
REFRESH_S = 1.0
"""Time until other workers notice a change."""
STATE = "state"


class CaptureState(msgspec.Struct, frozen=True):
    """A capture: ``ended`` is the reason why it captures nothing more, empty while it does. Times are Unix times."""

    key: str
    by: str
    begun_at: float
    until: float
    max_bytes: int
    ended: str = ""


_decode_state = msgspec.json.Decoder(CaptureState).decode
_decode = msgspec.json.Decoder(Captured).decode


class Capture:
    """The capture of one process. ``on_change`` is called when requests of another key are to be captured, or none."""

    def __init__(self, shelf: Shelf | None = None, on_change: Callable[[], None] = lambda: None) -> None:
        self.key: str | None = None
        """Name of the key whose requests are captured now."""
        self.state: CaptureState | None = None
        self._shelf = shelf or MemoryShelf()
        self._on_change = on_change
        self._ended: dict[str, Captured] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, key: str, by: str, duration_s: float, max_bytes: int) -> None:
        """Begin to capture the requests of a key; what was captured before is removed."""
        self._shelf.clear()
        now = time.time()
        self._set(CaptureState(key, by, now, now + duration_s, max_bytes))
        fields = {"by": by, "key": key, "seconds": round(duration_s), "max_bytes": max_bytes}
        log.warning("capture begins", extra={"fields": fields})

    def end(self, reason: str) -> None:
        """Capture nothing more; what was captured stays."""
        if self.state is not None and not self.state.ended:
            self._set(msgspec.structs.replace(self.state, ended=reason, until=time.time()))
            fields = {"key": self.state.key, "reason": reason, "requests": len(self.names())}
            log.warning("capture ends", extra={"fields": fields})

    def remove(self, by: str) -> None:
        """End it, and remove what was captured."""
        self.end(f"by {by}")
        self._shelf.clear()
        self._apply(None)
        log.warning("capture removed", extra={"fields": {"by": by}})

    async def refresh(self) -> None:
        """Follow the changes of other workers, for ever."""
        while True:
            await asyncio.sleep(REFRESH_S)
            found = await asyncio.to_thread(self._shelf.get, STATE)
            state = None if found is None else _decode_state(found)
            if state != self.state:
                self._apply(state)

    def names(self) -> Sequence[str]:
        """Return the ids of the captured requests, the oldest first."""
        return [name for name in self._shelf.names() if name != STATE]

    def get(self, id: str) -> Captured | None:
        """Return a captured request."""
        found = None if id == STATE else self._shelf.get(id)
        return None if found is None else _decode(found)

    def size_bytes(self) -> int:
        """Return the size of all captured requests."""
        return self._shelf.size_bytes()

    def tap(self, exchange: Exchange) -> Exchange:
        """Return an exchange that is captured if it is of the key, else the exchange itself."""
        principal = exchange.caller
        if self.state is None or not isinstance(principal, Principal) or principal.name != self.key:
            return exchange
        room_bytes = self.state.max_bytes - self._shelf.size_bytes()
        if room_bytes <= 0 or len(self.names()) >= MAX_REQUESTS:
            self.end("full")
            return exchange
        return CapturedExchange(exchange, principal.name, room_bytes)

    def keep(self, exchange: CapturedExchange) -> None:
        """Keep an exchange that has ended, a moment later."""
        captured = exchange.end()
        self._ended[captured.id] = captured
        asyncio.get_running_loop().call_later(PUT_AFTER_S, self._put_soon, captured.id)

    def record(self, lines: Sequence[Line]) -> None:
        """Take the log lines of ended requests, in any thread."""
        for _, fields in lines:
            captured = self._ended.get(fields["id"])
            if captured is not None:
                captured.record = fields

    def _put_soon(self, id: str) -> None:
        captured = self._ended.pop(id)
        if self.state is not None and captured.at >= self.state.begun_at and captured.key == self.state.key:
            asyncio.get_running_loop().run_in_executor(None, self._put, captured)

    def _put(self, captured: Captured) -> None:
        try:
            self._shelf.put(captured.id, msgspec.json.encode(captured))
        except OSError as error:
            log.error("request %s is not captured: %s", captured.id, error.strerror or error)

    def _set(self, state: CaptureState) -> None:
        self._shelf.put(STATE, msgspec.json.encode(state))
        self._apply(state)

    def _apply(self, state: CaptureState | None) -> None:
        self.state = state
        self.key = None if state is None or state.ended else state.key
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if state is not None:
            due_s = state.until - time.time() + (KEEP_S if state.ended else 0)
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due_s), self._expire)
        self._on_change()

    def _expire(self) -> None:
        if self.state is None or self.state.ended:
            self._shelf.clear()
            self._apply(None)
        else:
            self.end("time")

    def close(self) -> None:
        """Remove everything, at the end of the process."""
        if self._timer is not None:
            self._timer.cancel()
        self._shelf.clear()
