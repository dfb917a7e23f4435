"""Conversations by name: a stored name for the end of a chain of responses.

A response in a conversation continues the one that the name points at, and becomes it. Items that are added without a
request are stored as a response without output; deleted items are recorded by id, since responses are not rewritten. Of
two responses that continue one conversation at the same time, the later to end is continued.
"""

import secrets
import time
from typing import Any

import msgspec
import orjson

from cortex.errors import ConversationNotFoundError
from cortex.store import items as stored_items
from cortex.store.chains import NAME, UNANSWERED, Chains, aside
from cortex.store.interface import StoredResponse
from cortex.wire.errors import InvalidTypeError

_NO_ANSWER = b'{"output":[]}'


class NamedConversations(Chains):
    """The named conversations of a principal."""

    async def create(self, items: list[dict[str, Any]], metadata: dict[str, str]) -> dict[str, Any]:
        """Make a conversation of some items, and return it. Raises :class:`StoreUnavailableError`."""
        _check(items)
        id = f"{NAME}_{secrets.token_hex(24)}"
        conversation = {
            "id": id,
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": metadata,
        }
        name = StoredResponse("", b"[]", orjson.dumps(conversation))
        await self.put(id, name)
        if items:
            await self.add_items(id, items)
        return conversation

    async def get(self, id: str) -> dict[str, Any]:
        """Return a conversation. Raises :class:`ConversationNotFoundError`, as all below do."""
        conversation: dict[str, Any] = orjson.loads((await self.name(id)).body)
        return conversation

    async def update(self, id: str, metadata: dict[str, str]) -> dict[str, Any]:
        """Replace the metadata of a conversation."""
        name = await self.name(id)
        conversation: dict[str, Any] = orjson.loads(name.body) | {"metadata": metadata}
        await self.put(id, msgspec.structs.replace(name, body=orjson.dumps(conversation)))
        return conversation

    async def delete(self, id: str) -> None:
        """Delete the conversation; its responses stay."""
        await self.name(id)
        await self.forget(id)

    async def items(self, id: str) -> list[msgspec.Raw]:
        """Return the items of a conversation, the oldest first."""
        return (await self.load_named(await self.name(id), is_bounded=False))[1]

    async def item(self, id: str, item_id: str) -> bytes:
        """Return an item of a conversation."""
        items = await self.items(id)
        found = await aside(items, lambda: next((item for item in items if stored_items.id_of(item) == item_id), None))
        if found is None:
            raise ConversationNotFoundError(f"Item with id '{item_id}' not found.", param="item_id")
        return bytes(found)

    async def add_items(self, id: str, items: list[dict[str, Any]]) -> list[msgspec.Raw]:
        """Add items without a request; return them in the form of a listing.

        Raises:
            ConversationFullError: the chain has its greatest length.
        """
        _check(items)
        name = await self.name(id)
        chain = await self.chain_of(name)
        listed = stored_items.listed(items)
        unanswered = f"{UNANSWERED}_{secrets.token_hex(24)}"
        await self.put(unanswered, StoredResponse(name.previous, listed, _NO_ANSWER), chain)
        await self.put(id, msgspec.structs.replace(name, previous=unanswered))
        return stored_items.kept_items(listed)

    async def delete_item(self, id: str, item_id: str) -> dict[str, Any]:
        """Delete an item and return the conversation."""
        name = await self.name(id)
        await self.item(id, item_id)
        gone = [*orjson.loads(name.items), item_id]
        await self.put(id, msgspec.structs.replace(name, items=orjson.dumps(gone)))
        return await self.get(id)


def _check(items: list[dict[str, Any]]) -> None:
    """Raise :class:`InvalidTypeError` for an item that cannot be listed."""
    for at, item in enumerate(items):
        if not isinstance(item.get("type") or "message", str):
            key = f"items[{at}].type"
            raise InvalidTypeError(f"Invalid type for '{key}': expected a string.", param=key)
