"""Bodies of requests that crash nodes, so that neither a request nor its client's retries take a whole fleet down.

A death is a connection that was lost while a node had the request, or a node's report that its worker process was. A
request is sent once more after the first death and never after the second, on any node; its body is then refused for a
while, since SDKs retry by themselves. Requests of one body that are lost together are one death, since a node that is
restarted loses many. A complete answer clears a body. There is no clock here: times are arguments.
"""

from collections import OrderedDict
from dataclasses import dataclass

MAX_DEATHS = 2
REMEMBER_S = 120.0
"""Time for which a body is remembered after its last death: about a node's restart and load of a model."""

MAX_BODIES = 1024

Body = tuple[int, int]
"""Length and hash of a body; Python's hash is keyed anew in each process."""


@dataclass(slots=True)
class _Known:
    deaths: int
    last_at: float


class Deaths:
    """The latest bodies of which nodes died."""

    def __init__(self) -> None:
        self._known: OrderedDict[Body, _Known] = OrderedDict()

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._known)

    def is_deadly(self, body: bytes, now: float) -> bool:
        """Return whether a body must not be sent to any node."""
        if not self._known:
            return False
        known = self._find(_key(body), now)
        return known is not None and known.deaths >= MAX_DEATHS

    def record(self, body: bytes, sent_at: float, now: float) -> bool:
        """Record that a node died of a body sent at ``sent_at``; return whether that reaches the limit of deaths."""
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
        """Record that a node has answered a body."""
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
