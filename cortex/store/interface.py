"""What a store of responses does, whatever it is made of.

It keeps bytes under ids for a time and knows nothing of what is in them. Several gateways may share one.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec


class StoredResponse(msgspec.Struct, frozen=True, array_like=True):
    """One turn: the response it continues (empty if none), the items of its own input, and the response as it was told.

    ``items`` is a JSON array without the items of earlier turns, ``body`` the response object.
    """

    previous: str
    items: msgspec.Raw
    body: msgspec.Raw


class ResponseStore(Protocol):
    """Keeps responses by id."""

    async def open(self) -> None:
        """Get ready.

        Raises:
            StoreError: it cannot be reached, or not be written to.
        """

    async def get(self, id: str) -> StoredResponse | None:
        """Return a response; ``None`` if it is not there, or not any more."""

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
