"""The interface of a store of records: responses, items that came without one, and conversations, by id and owner.

A record that continues another names it, so that records form chains. A store reads a chain in one query and does not
look into items. Several gateways may share a store.
"""

import functools
import logging
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

log = logging.getLogger("cortex.store")


class StoredResponse(msgspec.Struct, frozen=True, array_like=True, tag="response"):
    """Response: the items that it adds to its chain, and the object that clients get."""

    previous: str
    """Id of the record that it continues; empty if none."""
    items: bytes
    """JSON array of the items of its input, then those of its output."""
    num_inputs: int
    """Number of items of its input."""
    body: bytes
    """Response object."""
    chain_length: int = 1
    """Number of records of the chain that ends with it."""
    sse_events: bytes = b""
    """SSE events of a background response that has ended."""
    lease_until: float = 0
    """End of the lease of a background response that is being generated, in Unix seconds; else 0."""


class StoredItems(msgspec.Struct, frozen=True, array_like=True, tag="items"):
    """Items of a conversation that were added without a response that is stored."""

    previous: str
    """Id of the record that they follow; empty if none."""
    items: bytes
    """JSON array of the items."""
    chain_length: int = 1
    """Number of records of the chain that ends with it."""


class StoredConversation(msgspec.Struct, frozen=True, array_like=True, tag="conversation"):
    """Conversation: a name for the end of a chain."""

    body: bytes
    """Conversation object."""
    last: str = ""
    """Id of the last record of its chain; empty for an empty conversation."""
    deleted: tuple[str, ...] = ()
    """Ids of the items of its chain that were deleted; records are not rewritten."""


Record = StoredResponse | StoredItems | StoredConversation


class Link(NamedTuple):
    """Record of a chain, as far as a chain needs it."""

    id: str
    previous: str
    """Id of the record before it; empty if it is the first."""
    items: bytes
    """JSON array of its items."""
    lease_until: float
    """End of its lease, as in :class:`StoredResponse`."""


class Row(NamedTuple):
    """Stored form of a record. What a chain needs is apart from the rest, which may be much larger."""

    previous: str
    items: bytes
    lease_until: float
    rest: bytes


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def to_row(record: Record) -> Row:
    """Return the stored form of a record."""
    match record:
        case StoredConversation():
            return Row("", b"", 0, _ENCODER.encode(record))
        case StoredItems():
            return Row(record.previous, record.items, 0, _ENCODER.encode(replace(record, items=b"")))
        case StoredResponse():
            rest = _ENCODER.encode(replace(record, items=b"", lease_until=0))
            return Row(record.previous, record.items, record.lease_until, rest)


def from_row(row: Row) -> Record | None:
    """Return the record of a stored form; ``None`` for other bytes, which count as absent."""
    try:
        record = _DECODER.decode(row.rest)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        _log_damaged()
        return None
    match record:
        case StoredConversation():
            return record
        case StoredItems():
            return replace(record, items=row.items)
        case StoredResponse():
            return replace(record, items=row.items, lease_until=row.lease_until)


@functools.cache
def _log_damaged() -> None:
    log.error("the store of responses has rows that cannot be read: they count as not there")


class RecordStore(Protocol):
    """A store of records. Every method but ``obstacle`` raises :class:`StoreError` if the store fails."""

    async def open(self) -> None:
        """Open the store."""

    async def get(self, owner: str, id: str) -> Record | None:
        """Return a record; ``None`` if it is absent, has expired or belongs to another owner."""

    async def chain(self, owner: str, id: str, *, max_records: int, max_bytes: int) -> list[Link]:
        """Return the chain that ends with a record, the latest first, read in one query.

        It breaks off before a record that :meth:`get` would not return, at ``max_records``, and after the items exceed
        ``max_bytes``: its last link then names a previous one.
        """

    def obstacle(self, size_bytes: int) -> "StoreError | None":
        """Return the error that a write of so many bytes would raise, as far as it is known without waiting."""

    async def put(self, owner: str, id: str, record: Record) -> None:
        """Store a record, and keep those of its chain for as long. Raises :class:`StoreFullError`."""

    async def renew(self, owner: str, id: str, lease_until: float) -> bool:
        """Give the lease of a record another end; return false if the record has no lease, or is absent."""

    async def delete(self, owner: str, id: str) -> bool:
        """Delete a record; return whether :meth:`get` would have returned it."""

    async def close(self) -> None:
        """Close the store."""


class StoreError(Exception):
    """A store failed. The message names the store and its error."""


class StoreFullError(StoreError):
    """The disk is full, or the key's share of the store."""
