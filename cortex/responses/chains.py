"""The records of a principal, and the chains that they form.

Each record is stored once, with the id of the one that it continues. A chain is bounded in length and in bytes, and
read in one query.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Self, TypeVar

import msgspec

from cortex.errors import (
    ConversationFullError,
    ConversationNotFoundError,
    ConversationTooLargeError,
    PreviousResponseNotFoundError,
    StoreFullError,
    StoreUnavailableError,
)
from cortex.responses import items
from cortex.responses.items import Item
from cortex.store import interface
from cortex.store.interface import Record, RecordStore, StoredConversation, StoredResponse, StoreError
from cortex.wire.errors import ApiError, InvalidRequestError

log = logging.getLogger("cortex.responses")

T = TypeVar("T")

MAX_CHAIN = 4096
"""Greatest number of records of a chain; a longer one does not fit any context."""
MAX_REFERENCES = 100
"""Greatest number of references of a request to items of other responses."""
LISTED = 4
"""Ratio of the bytes of a conversation that can be listed, and cut down, to those of one that can be continued."""

RESPONSE, CONVERSATION, ADDED = "resp", "conv", "turn"
"""Prefixes of ids in the store: a response, a conversation, items without a response."""

_ID = re.compile(r"[a-z]+_[A-Za-z0-9_-]{1,120}")
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]+)_\d+")

MAX_ITEMS_AT_ONCE = 500
"""Greatest number of items that are read or encoded on the event loop; a thread takes more."""
MAX_BYTES_AT_ONCE = 256 * 1024
"""Greatest size of items that are read on the event loop."""

NO_CHAIN: tuple[bytes, ...] = ()


class Chains:
    """The records of a principal. Those of others count as absent, as do all without a store."""

    def __init__(self, store: RecordStore | None, owner: str = "", max_bytes: int = 32 * 1024 * 1024) -> None:
        self._store = store
        self.owner = owner
        self.max_bytes = max_bytes
        """Limit of a request's items together with those that it continues or refers to."""

    def of(self, owner: str) -> Self:
        """Return the chains of a principal."""
        return type(self)(self._store, owner, self.max_bytes) if owner != self.owner else self

    async def find(self, id: str) -> Record | None:
        """Return the record of an id, or ``None``. Raises :class:`StoreUnavailableError`."""
        if self._store is None or _ID.fullmatch(id) is None:
            return None
        return await _answered(self._store.get(self.owner, id))

    async def put(self, id: str, record: Record) -> None:
        """Store a record. Raises :class:`StoreUnavailableError`, :class:`StoreFullError`."""
        if self._store is None:
            raise store_error(StoreError("there is none"))
        await _answered(self._store.put(self.owner, id, record))

    async def renew(self, id: str, lease_until: float) -> bool:
        """Renew the lease of a record; return false if it has none. Raises :class:`StoreUnavailableError`."""
        return self._store is not None and await _answered(self._store.renew(self.owner, id, lease_until))

    async def forget(self, id: str) -> bool:
        """Delete a record; return whether it existed. Raises :class:`StoreUnavailableError`."""
        if self._store is None or _ID.fullmatch(id) is None:
            return False
        return await _answered(self._store.delete(self.owner, id))

    async def conversation(self, id: str) -> StoredConversation:
        """Return a conversation. Raises :class:`ConversationNotFoundError`."""
        stored = await self.find(id)
        if not isinstance(stored, StoredConversation):
            raise ConversationNotFoundError(f"Conversation with id '{id}' not found.", param="conversation")
        return stored

    async def load_conversation(self, stored: StoredConversation, max_bytes: int) -> tuple[bytes, ...]:
        """Return the items of a conversation without those that were deleted. Raises as :meth:`load` does."""
        if not stored.deleted:
            return await self.load(stored.last, "conversation", max_bytes)
        found = await self.load(stored.last, "conversation", LISTED * max_bytes)
        left = await aside(lambda: _without(found, frozenset(stored.deleted)), *found)
        if sum(map(len, left)) > max_bytes:
            raise self.too_large("conversation")
        return left

    async def load(self, last: str, param: str, max_bytes: int) -> tuple[bytes, ...]:
        """Return the items of the chain that ends with a record: a JSON array for each record, the oldest first.

        Raises:
            PreviousResponseNotFoundError: a record is absent, of a chain that ``previous_response_id`` names.
            ConversationNotFoundError: a record is absent, of a conversation's chain.
            ConversationTooLargeError: it has more than ``max_bytes``.
            ConversationFullError: it is longer than any chain.
            InvalidRequestError: it has a response that is still being generated.
            StoreUnavailableError: the store failed.
        """
        if not last:
            return NO_CHAIN
        if self._store is None or _ID.fullmatch(last) is None or last.startswith(f"{CONVERSATION}_"):
            raise _not_found(last, param)
        limits = {"max_records": MAX_CHAIN, "max_bytes": max_bytes}
        links = await _answered(self._store.chain(self.owner, last, **limits))
        for link in links:
            if link.lease_until:
                raise InvalidRequestError(
                    f"Response '{link.id}' is still being generated: it cannot be continued yet.", param=param
                )
        if sum(len(link.items) for link in links) > max_bytes:
            raise self.too_large(param)
        if not links or links[-1].previous:
            raise _full(param) if len(links) == MAX_CHAIN else _not_found(last, param)
        return tuple(link.items for link in reversed(links))

    def too_large(self, param: str) -> ConversationTooLargeError:
        """Return the error of a conversation above ``max_bytes``."""
        return ConversationTooLargeError(
            f"The conversation with this request is more than {self.max_bytes} bytes: begin a new conversation with "
            "what still matters, or compact it.",
            param=param,
        )

    async def resolve_references(self, own: list[Item]) -> list[Item]:
        """Return items with references replaced by the items; an item's id contains its response's."""
        outputs: dict[str, Mapping[str, msgspec.Raw]] = {}
        found: list[Item] = []
        num_references = size_bytes = 0
        for item in own:
            if not is_reference(item):
                found.append(item)
                continue
            num_references += 1
            if num_references > MAX_REFERENCES:
                raise InvalidRequestError(
                    f"Invalid 'input': it refers to more than {MAX_REFERENCES} items.", param="input"
                )
            id = items.text_of(item.get("id")) or ""
            match = _ITEM_ID.fullmatch(id)
            if match is not None and match[1] not in outputs:
                outputs[match[1]], row_bytes = await self._outputs(f"{RESPONSE}_{match[1]}")
                size_bytes += row_bytes
            meant = outputs[match[1]].get(match[0]) if match is not None else None
            if meant is None:
                raise InvalidRequestError(f"Item with id '{id[:200]}' not found.", param="input")
            size_bytes += len(bytes(meant))
            if size_bytes > self.max_bytes:
                raise self.too_large("input")
            found.append(items.FIELDS.decode(meant))
        return found

    async def _outputs(self, id: str) -> tuple[Mapping[str, msgspec.Raw], int]:
        """Return the output items of a response by id, none if it is absent, and its size in bytes."""
        stored = await self.find(id)
        if not isinstance(stored, StoredResponse):
            return {}, 0
        return {items.id_of(item): item for item in items.split(stored.items)[stored.num_inputs :]}, len(stored.items)


def is_reference(item: Item) -> bool:
    """Return whether an item stands for an item of another response."""
    return items.text_of(item.get("type")) == "item_reference"


def _without(arrays: tuple[bytes, ...], deleted: frozenset[str]) -> tuple[bytes, ...]:
    return tuple(
        msgspec.json.encode([item for item in items.split(array) if items.id_of(item) not in deleted])
        for array in arrays
    )


async def aside(work: Callable[[], T], *arrays: bytes, num_items: int = 0) -> T:
    """Return the result of ``work``, which reads the items of some arrays; it runs in a thread if they are much."""
    size_bytes = sum(map(len, arrays))
    is_little = size_bytes <= MAX_BYTES_AT_ONCE and num_items <= MAX_ITEMS_AT_ONCE
    return work() if is_little else await asyncio.to_thread(work)


async def _answered(answer: Awaitable[T]) -> T:
    """Return a store's answer. Raises :class:`StoreUnavailableError`, :class:`StoreFullError`."""
    try:
        return await answer
    except StoreError as error:
        raise store_error(error) from error


def _not_found(previous: str, param: str) -> ApiError:
    if param == "conversation":
        return ConversationNotFoundError(
            "A part of the conversation is not stored any more: begin a new one.", param=param
        )
    return PreviousResponseNotFoundError(f"Previous response with id '{previous}' not found.", param=param)


def check_length(chain_length: int, param: str) -> None:
    """Raise :class:`ConversationFullError` for a chain that cannot be continued."""
    if chain_length >= MAX_CHAIN:
        raise _full(param)


def _full(param: str) -> ConversationFullError:
    return ConversationFullError(
        f"The conversation has {MAX_CHAIN} responses, which is the most: begin a new one with what still matters.",
        param=param,
    )


def store_error(error: StoreError) -> StoreUnavailableError | StoreFullError:
    """Return a store's failure as an error for the client, and log it."""
    log.error("%s", error)
    if isinstance(error, interface.StoreFullError):
        return StoreFullError("The store of responses has no room for this; send 'store': false, or delete others.")
    return StoreUnavailableError("The store of responses does not answer.", retry_after_s=1)
