"""Conversations by name: a stored name for the end of a chain of responses.

A response in a conversation continues the record that the name points at, and becomes it. Items that are added without
a request are a record of their own; deleted items are recorded by id, since records are not rewritten. Of two responses
that continue one conversation at the same time, the later to end is continued.
"""

import secrets
import time

import msgspec
import orjson

from cortex.errors import ConversationNotFoundError
from cortex.responses import items as json_items
from cortex.responses.chains import ADDED, CONVERSATION, LISTED, Chains, aside, check_length
from cortex.responses.items import Item
from cortex.store.interface import StoredConversation, StoredItems, StoredResponse
from cortex.wire.errors import InvalidTypeError


class Conversations(Chains):
    """The conversations of a principal."""

    async def create(self, items: list[Item], metadata: dict[str, str]) -> bytes:
        """Make a conversation of some items, and return it. Raises :class:`StoreUnavailableError`."""
        _check(items)
        id = f"{CONVERSATION}_{secrets.token_hex(24)}"
        created = {"id": id, "object": "conversation", "created_at": int(time.time()), "metadata": metadata}
        stored = StoredConversation(orjson.dumps(created))
        await self.put(id, stored)
        if items:
            await self.add_items(id, items)
        return stored.body

    async def get(self, id: str) -> bytes:
        """Return a conversation. Raises :class:`ConversationNotFoundError`, as all below do."""
        return (await self.conversation(id)).body

    async def update(self, id: str, metadata: dict[str, str]) -> bytes:
        """Replace the metadata of a conversation, and return it."""
        stored = await self.conversation(id)
        body = orjson.dumps(orjson.loads(stored.body) | {"metadata": metadata})
        await self.put(id, msgspec.structs.replace(stored, body=body))
        return body

    async def delete(self, id: str) -> None:
        """Delete the conversation; its responses stay."""
        await self.conversation(id)
        await self.forget(id)

    async def items(self, id: str) -> bytes:
        """Return the items of a conversation as a JSON array, the oldest first.

        Raises:
            ConversationTooLargeError: it is too large even to be listed.
        """
        stored = await self.conversation(id)
        return json_items.joined(await self.load_conversation(stored, LISTED * self.max_bytes))

    async def item(self, id: str, item_id: str) -> bytes:
        """Return an item of a conversation."""
        array = await self.items(id)
        found = await aside(lambda: _find(array, item_id), array)
        if found is None:
            raise ConversationNotFoundError(f"Item with id '{item_id}' not found.", param="item_id")
        return bytes(found)

    async def add_items(self, id: str, items: list[Item]) -> bytes:
        """Add items without a request; return them in the form of a listing, as a JSON array.

        Raises:
            ConversationFullError: the chain has its greatest length.
        """
        _check(items)
        stored = await self.conversation(id)
        last = await self.find(stored.last) if stored.last else None
        chain_length = last.chain_length if isinstance(last, StoredResponse | StoredItems) else 0
        check_length(chain_length, "conversation")
        listed = json_items.listed(items)
        added = f"{ADDED}_{secrets.token_hex(24)}"
        await self.put(added, StoredItems(stored.last, listed, chain_length + 1))
        await self.put(id, msgspec.structs.replace(stored, last=added))
        return listed

    async def delete_item(self, id: str, item_id: str) -> bytes:
        """Delete an item and return the conversation."""
        await self.item(id, item_id)
        stored = await self.conversation(id)
        await self.put(id, msgspec.structs.replace(stored, deleted=(*stored.deleted, item_id)))
        return stored.body


def _find(array: bytes, item_id: str) -> msgspec.Raw | None:
    return next((item for item in json_items.split(array) if json_items.id_of(item) == item_id), None)


def _check(items: list[Item]) -> None:
    """Raise :class:`InvalidTypeError` for an item that cannot be listed."""
    for at, item in enumerate(items):
        type = item.get("type", msgspec.Raw(b"null"))
        if bytes(type) != b"null" and json_items.text_of(type) is None:
            key = f"items[{at}].type"
            raise InvalidTypeError(f"Invalid type for '{key}': expected a string.", param=key)
