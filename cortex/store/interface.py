"""What a store of responses does, whatever it is made of.

It keeps bytes under ids for a time and knows nothing of what is in them. Several gateways may share one.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec

log = logging.getLogger("cortex.store")


class StoredResponse(msgspec.Struct, frozen=True, array_like=True):
    """One turn: the response it continues (empty if none), the items of its own input, and the response as it was told.

    ``items`` is a JSON array without the items of earlier turns, ``body`` the response object. Of one that was made in
    the background, ``sse_events`` are those of its stream. ``until`` is set of one that is still being made: the time
    at which whoever makes it must have said so again. ``owner`` names the principal it was made for.
    """

    previous: str
    items: msgspec.Raw
    body: msgspec.Raw
    sse_events: bytes = b""
    until: float = 0
    owner: str = ""


class _Row(msgspec.Struct, frozen=True, array_like=True):
    previous: str
    items: bytes
    body: bytes
    sse_events: bytes = b""
    until: float = 0
    owner: str = ""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Row)


def to_bytes(stored: StoredResponse) -> bytes:
    """Return what a store keeps."""
    row = _Row(stored.previous, bytes(stored.items), bytes(stored.body), stored.sse_events, stored.until, stored.owner)
    return _ENCODER.encode(row)


def from_bytes(value: bytes) -> StoredResponse | None:
    """Return what :func:`to_bytes` made a value of; ``None`` for what it made nothing of, which is as not there."""
    try:
        row = _DECODER.decode(value)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        _say_damaged()
        return None
    return StoredResponse(
        row.previous, msgspec.Raw(row.items), msgspec.Raw(row.body), row.sse_events, row.until, row.owner
    )


@functools.cache
def _say_damaged() -> None:
    log.error("the store of responses has rows that cannot be read: they count as not there")


class ResponseStore(Protocol):
    """Keeps responses by id."""

    async def open(self) -> None:
        """Get ready.

        Raises:
            StoreError: it cannot be reached, or not be written to.
        """

    async def get(self, id: str) -> StoredResponse | None:
        """Return a response; ``None`` if it is not there, or not any more."""

    def obstacle(self, size_bytes: int) -> "StoreError | None":
        """Return why so many bytes cannot be kept, as far as that is known now and without waiting."""

    async def put(self, id: str, stored: StoredResponse, chain: Sequence[str]) -> None:
        """Keep a response, and those it continues for as long as itself.

        Raises:
            StoreError: it could not be kept.
        """

    async def delete(self, id: str) -> bool:
        """Forget a response; return whether it was there."""

    async def close(self) -> None:
        """Let go of everything."""


class StoreError(Exception):
    """A store failed. The message says which one, and what it said."""


class StoreFullError(StoreError):
    """There is no room for it, on the disk or among what a key may keep."""
