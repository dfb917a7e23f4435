"""Which request bodies nodes died of, so that one request does not take a whole fleet down, nor its client's retries.

A death is a connection that was lost while a node had the request, or a node that says so of the process behind it. A
request is tried once more after the first and never after the second, wherever that was; its body is then refused for a
while, since SDKs send it again by themselves. Requests of one body that were lost together are one death: a node that
is restarted takes many with it. An answer that is complete clears a body. It looks at no clock: times are arguments.
"""

from collections import OrderedDict
from dataclasses import dataclass

MAX_DEATHS = 2
REMEMBER_S = 120.0
"""Since the last death; about as long as a node takes to come back and load a model."""

MAX_BODIES = 1024

Body = tuple[int, int]
"""A body's length and hash, which Python keys anew for each process."""


@dataclass(slots=True)
class _Known:
    deaths: int
    last_at: float


class Deaths:
    """Bodies that nodes died of, the latest of them."""

    def __init__(self) -> None:
        self._known: OrderedDict[Body, _Known] = OrderedDict()

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._known)

    def is_deadly(self, body: bytes, now: float) -> bool:
        """Return whether a body is not to be sent to any node."""
        if not self._known:
            return False
        known = self._find(_key(body), now)
        return known is not None and known.deaths >= MAX_DEATHS

    def note(self, body: bytes, sent_at: float, now: float) -> bool:
        """Note that a node died of a body that was sent to it then; return whether that was one death too many."""
        key = _key(body)
        known = self._find(key, now)
        if known is None:
            known = self._known[key] = _Known(0, 0.0)
            if len(self._known) > MAX_BODIES:
                self._known.popitem(last=False)
        if not known.deaths or sent_at > known.last_at:
            known.deaths += 1
            known.last_at = now
        self._known.move_to_end(key)
        return known.deaths >= MAX_DEATHS

    def forget(self, body: bytes) -> None:
        """Note that a node has answered a body."""
        if self._known:
            self._known.pop(_key(body), None)

    def _find(self, key: Body, now: float) -> _Known | None:
        known = self._known.get(key)
        if known is not None and now - known.last_at > REMEMBER_S:
            del self._known[key]
            return None
        return known


def _key(body: bytes) -> Body:
    return len(body), hash(body)
