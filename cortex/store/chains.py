"""The stored responses of a principal, and the chains that they form.

Each response is stored once, with the id of the one that it continues. A chain is bounded in length and in bytes.
"""

import asyncio
import functools
import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import msgspec
import orjson

from cortex.errors import (
    ConversationFullError,
    ConversationNotFoundError,
    ConversationTooLargeError,
    PreviousResponseNotFoundError,
    StoreFullError,
    StoreUnavailableError,
)
from cortex.store import interface, items
from cortex.store.interface import ResponseStore, StoredResponse, StoreError
from cortex.wire.errors import ApiError, InvalidRequestError

log = logging.getLogger("cortex.store")

T = TypeVar("T")

MAX_CHAIN = 4096
"""Greatest number of responses of a chain; a longer one does not fit any context."""
MAX_REFERENCES = 100
"""Greatest number of references of a request to items of other responses."""

RESPONSE, NAME, UNANSWERED = "resp", "conv", "turn"
"""Prefixes of ids in the store: a response, a named conversation, items of a conversation without a response."""

_ID = re.compile(r"[a-z]+_[A-Za-z0-9_-]{1,120}")
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]+)_\d+")

MAX_ITEMS_AT_ONCE = 500
"""Greatest number of items that are read or encoded on the event loop; a thread takes more."""
MAX_BYTES_AT_ONCE = 1024 * 1024
"""Greatest size of items that are read on the event loop."""

UNREADABLE = (msgspec.MsgspecError, KeyError, ValueError, RecursionError)
"""Exceptions of reading a node's response."""


class Chains:
    """The stored responses of a principal. Those of others count as absent, as do all without a store."""

    def __init__(self, store: ResponseStore | None, owner: str = "", max_bytes: int = 32 * 1024 * 1024) -> None:
        self._store = store
        self.owner = owner
        self.max_bytes = max_bytes
        """Limit of a request's items together with those that it continues or refers to."""

    def of(self, owner: str) -> Self:
        """Return the chains of a principal."""
        return type(self)(self._store, owner, self.max_bytes) if owner != self.owner else self

    async def find(self, id: str) -> StoredResponse | None:
        """Return the entry of an id, or ``None``. Raises :class:`StoreUnavailableError`."""
        return await self._get(id)

    async def put(self, id: str, stored: StoredResponse, chain: Sequence[str] = ()) -> None:
        """Store an entry under an id. Raises :class:`StoreUnavailableError`."""
        if self._store is None:
            raise _unavailable(StoreError("there is none"))
        try:
            await self._store.put(id, msgspec.structs.replace(stored, owner=self.owner), chain)
        except StoreError as error:
            raise store_error(error) from error

    async def forget(self, id: str) -> bool:
        """Delete the entry of an id; return whether it existed. Raises :class:`StoreUnavailableError`."""
        if self._store is None or await self._get(id) is None:
            return False
        try:
            return await self._store.delete(id)
        except StoreError as error:
            raise _unavailable(error) from error

    async def name(self, id: str) -> StoredResponse:
        """Return the entry of a named conversation. Raises :class:`ConversationNotFoundError`."""
        stored = await self._get(id) if id.startswith(f"{NAME}_") else None
        if stored is None:
            raise ConversationNotFoundError(f"Conversation with id '{id}' not found.", param="conversation")
        return stored

    async def chain_of(self, name: StoredResponse) -> tuple[str, ...]:
        """Return the ids of a conversation's responses, the latest first.

        Raises:
            ConversationFullError: the chain has its greatest length.
            ConversationNotFoundError: a response of the chain is absent.
        """
        found = [id async for id, _ in self._responses(name.previous, "conversation")]
        check_length(found, "conversation")
        return tuple(found)

    async def load_named(self, name: StoredResponse, *, is_bounded: bool) -> tuple[tuple[str, ...], list[msgspec.Raw]]:
        """Return the ids and the items of a named conversation. Raises as :meth:`load_chain` does."""
        gone = frozenset(msgspec.json.decode(name.items, type=list[str]))
        return await self.load_chain(name.previous, gone, param="conversation", is_bounded=is_bounded)

    async def load_chain(
        self,
        previous: str,
        gone: frozenset[str] = frozenset(),
        *,
        param: str = "previous_response_id",
        is_bounded: bool = True,
    ) -> tuple[tuple[str, ...], list[msgspec.Raw]]:
        """Return the ids and the items, except ``gone``, of the chain that ends with ``previous``."""
        chain: list[str] = []
        responses: list[Sequence[msgspec.Raw]] = []
        size_bytes = 0
        async for id, stored in self._responses(previous, param):
            chain.append(id)
            try:
                own = [*items.kept_items(stored.items), *items.output_items(stored.body)]
            except UNREADABLE:
                log.error("what is stored as %s is damaged", id)
                raise _not_found(previous, param) from None
            if gone:
                own = await aside(own, functools.partial(_without, own, gone))
            size_bytes += items.size_of(own)
            if is_bounded and size_bytes > self.max_bytes:
                raise self.too_large(param)
            responses.append(own)
        return tuple(chain), [item for own in reversed(responses) for item in own]

    async def _responses(self, previous: str, param: str) -> AsyncGenerator[tuple[str, StoredResponse], None]:
        """Yield the responses of a chain, the latest first."""
        id, count = previous, 0
        while id:
            if count == MAX_CHAIN:
                raise _full(param)
            stored = await self._get(id)
            if stored is None:
                raise _not_found(previous, param)
            if stored.until:
                raise InvalidRequestError(
                    f"Response '{id}' is still being generated: it cannot be continued yet.", param=param
                )
            yield id, stored
            id, count = stored.previous, count + 1

    def too_large(self, param: str) -> ConversationTooLargeError:
        """Return the error of a conversation above ``max_bytes``."""
        return ConversationTooLargeError(
            f"The conversation with this request is more than {self.max_bytes} bytes: begin a new conversation with "
            "what still matters, or compact it.",
            param=param,
        )

    async def resolve_references(self, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return items with references replaced by the items; an item's id contains its response's."""
        rows: dict[str, Mapping[str, msgspec.Raw]] = {}
        found: list[dict[str, Any]] = []
        num_references = size_bytes = 0
        for item in own:
            if item.get("type") != "item_reference":
                found.append(item)
                continue
            num_references += 1
            if num_references > MAX_REFERENCES:
                raise InvalidRequestError(
                    f"Invalid 'input': it refers to more than {MAX_REFERENCES} items.", param="input"
                )
            id = item.get("id")
            match = _ITEM_ID.fullmatch(id) if isinstance(id, str) else None
            if match is not None and match[1] not in rows:
                rows[match[1]], row_bytes = await self._outputs(f"{RESPONSE}_{match[1]}")
                size_bytes += row_bytes
            meant = rows[match[1]].get(match[0]) if match is not None else None
            if meant is None:
                raise InvalidRequestError(f"Item with id '{str(id)[:200]}' not found.", param="input")
            size_bytes += items.size_of([meant])
            if size_bytes > self.max_bytes:
                raise self.too_large("input")
            found.append(orjson.loads(bytes(meant)))
        return found

    async def _outputs(self, id: str) -> tuple[Mapping[str, msgspec.Raw], int]:
        """Return the output items of a response by id, none if it is absent, and its size in bytes."""
        stored = await self._get(id)
        if stored is None:
            return {}, 0
        try:
            return {items.id_of(item): item for item in items.output_items(stored.body)}, len(stored.body)
        except UNREADABLE:
            log.error("what is stored as %s is damaged", id)
            return {}, 0

    async def _get(self, id: str) -> StoredResponse | None:
        if self._store is None or _ID.fullmatch(id) is None:
            return None
        try:
            stored = await self._store.get(id)
        except StoreError as error:
            raise _unavailable(error) from error
        return stored if stored is not None and stored.owner == self.owner else None


def _without(found: list[msgspec.Raw], gone: frozenset[str]) -> list[msgspec.Raw]:
    return [item for item in found if items.id_of(item) not in gone]


async def aside(read: Sequence[msgspec.Raw], work: Callable[[], T]) -> T:
    """Return the result of ``work``, which reads some items; it runs in a thread if they are many."""
    is_little = len(read) <= MAX_ITEMS_AT_ONCE and items.size_of(read) <= MAX_BYTES_AT_ONCE
    return work() if is_little else await asyncio.to_thread(work)


def _not_found(previous: str, param: str) -> ApiError:
    if param == "conversation":
        return ConversationNotFoundError(
            "A part of the conversation is not stored any more: begin a new one.", param=param
        )
    return PreviousResponseNotFoundError(f"Previous response with id '{previous}' not found.", param=param)


def check_length(chain: Sequence[str], param: str) -> None:
    """Raise :class:`ConversationFullError` for a chain that cannot be continued."""
    if len(chain) >= MAX_CHAIN:
        raise _full(param)


def _full(param: str) -> ConversationFullError:
    return ConversationFullError(
        f"The conversation has {MAX_CHAIN} responses, which is the most: begin a new one with what still matters.",
        param=param,
    )


def store_error(error: StoreError) -> StoreUnavailableError | StoreFullError:
    """Return a store's failure as an error for the client, and log it."""
    if isinstance(error, interface.StoreFullError):
        log.error("%s", error)
        return StoreFullError("The store of responses has no room for this; send 'store': false, or delete others.")
    return _unavailable(error)


def _unavailable(error: StoreError) -> StoreUnavailableError:
    log.error("%s", error)
    return StoreUnavailableError("The store of responses does not answer.", retry_after_s=1)
