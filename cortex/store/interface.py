"""The interface of a store of responses.

A store keeps bytes under ids for a time, whatever they mean. Several gateways may share one.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec

log = logging.getLogger("cortex.store")


class StoredResponse(msgspec.Struct, frozen=True, array_like=True):
    """A response: the id of the one it continues (empty if none), the items of its own input, and the response object.

    ``items`` is a JSON array without the items of earlier responses, ``body`` the response object. A background
    response has the ``sse_events`` of its stream, and while it runs ``until``, the end of its lease. ``owner`` names
    the principal.
    """

    previous: str
    items: bytes
    body: bytes
    sse_events: bytes = b""
    until: float = 0
    owner: str = ""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StoredResponse)


def to_bytes(stored: StoredResponse) -> bytes:
    """Return a response as bytes."""
    return _ENCODER.encode(stored)


def from_bytes(value: bytes) -> StoredResponse | None:
    """Return the response from :func:`to_bytes`; ``None`` for other bytes, which count as absent."""
    try:
        return _DECODER.decode(value)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        _log_damaged()
        return None


@functools.cache
def _log_damaged() -> None:
    log.error("the store of responses has rows that cannot be read: they count as not there")


class ResponseStore(Protocol):
    """A store of responses by id."""

    async def open(self) -> None:
        """Open the store.

        Raises:
            StoreError: the store cannot be reached, or not be written to.
        """

    async def get(self, id: str) -> StoredResponse | None:
        """Return a response; ``None`` if it is absent or has expired."""

    def obstacle(self, size_bytes: int) -> "StoreError | None":
        """Return the error that a write of so many bytes would raise, as far as it is known without waiting."""

    async def put(self, id: str, stored: StoredResponse, chain: Sequence[str]) -> None:
        """Store a response, and keep those of its chain for as long.

        Raises:
            StoreError: the response could not be stored.
        """

    async def delete(self, id: str) -> bool:
        """Delete a response; return whether it existed."""

    async def close(self) -> None:
        """Close the store."""


class StoreError(Exception):
    """A store failed. The message names the store and its error."""


class StoreFullError(StoreError):
    """The disk is full, or the key's share of the store."""
