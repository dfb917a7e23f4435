"""Memory of WebSocket connections: the latest conversations of each, within a limit for each key and one for all.

A conversation that does not fit is not kept: a request that continues it gets ``previous_response_not_found``, and the
client sends the whole of it, as after a lost connection. The oldest of a key are dropped first; above the limit for
all, the oldest of the key that has most.
"""

from collections.abc import Iterator, MutableMapping

Items = tuple[bytes, ...]
"""JSON arrays of items."""

MAX_PER_CONNECTION = 8
"""Conversations that are kept for a connection, the latest."""
ARRAY_BYTES = 64
"""Memory of an array beside its text."""


class SocketMemory:
    """The memory of all connections of one process."""

    def __init__(self, max_bytes: int, max_bytes_per_key: int = 0) -> None:
        """``max_bytes_per_key`` 0 means a quarter of ``max_bytes``."""
        self._max_bytes = max_bytes
        self._max_bytes_per_key = max_bytes_per_key or max_bytes // 4
        self._sizes: dict[str, int] = {}
        self._kept: dict[str, dict[tuple[int, str], tuple[ConnectionHistory, int]]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return sum(self._sizes.values())

    def connection(self, owner: str) -> "ConnectionHistory":
        """Return the history of a new connection of a key. Clear it when the connection ends."""
        return ConnectionHistory(self, owner)

    def add(self, history: "ConnectionHistory", id: str, size_bytes: int) -> bool:
        """Count a conversation, dropping others; return false if it is too large."""
        if size_bytes > min(self._max_bytes, self._max_bytes_per_key):
            return False
        while self._sizes.get(history.owner, 0) + size_bytes > self._max_bytes_per_key:
            self._drop_oldest(history.owner)
        while self.num_bytes + size_bytes > self._max_bytes:
            self._drop_oldest(max(self._sizes, key=self._sizes.__getitem__))
        self._kept.setdefault(history.owner, {})[builtin_id(history), id] = history, size_bytes
        self._sizes[history.owner] = self._sizes.get(history.owner, 0) + size_bytes
        return True

    def remove(self, history: "ConnectionHistory", id: str) -> None:
        """Stop counting a conversation."""
        _, size_bytes = self._kept[history.owner].pop((builtin_id(history), id))
        self._sizes[history.owner] -= size_bytes
        if not self._kept[history.owner]:
            del self._kept[history.owner], self._sizes[history.owner]

    def _drop_oldest(self, owner: str) -> None:
        (_, id), (history, _) = next(iter(self._kept[owner].items()))
        del history[id]


builtin_id = id


class ConnectionHistory(MutableMapping[str, Items]):
    """Latest conversations of one connection, each whole, by the id of its last response."""

    def __init__(self, memory: SocketMemory, owner: str) -> None:
        self.owner = owner
        self._memory = memory
        self._items: dict[str, Items] = {}

    def __getitem__(self, id: str) -> Items:
        return self._items[id]

    def __setitem__(self, id: str, items: Items) -> None:
        if id in self._items:
            del self[id]
        if self._memory.add(self, id, sum(len(array) + ARRAY_BYTES for array in items)):
            self._items[id] = items
        while len(self._items) > MAX_PER_CONNECTION:
            del self[next(iter(self._items))]

    def __delitem__(self, id: str) -> None:
        del self._items[id]
        self._memory.remove(self, id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
