"""The paths of conversations by name: ``/v1/conversations`` and those below it.

A conversation is a name for the end of a chain of stored responses (:mod:`cortex.store.named`); no node takes part.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from cortex.access.authenticator import principal_of
from cortex.dialects.parameters import Parameters
from cortex.http_io import Exchange, query_parameters
from cortex.store.chains import aside
from cortex.store.named import NamedConversations
from cortex.store.paging import page_of

PREFIX = "/v1/conversations/"


class CreateBody(msgspec.Struct):
    """Body of a request for a new conversation."""

    items: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None


class UpdateBody(msgspec.Struct):
    """Body of a request to change a conversation."""

    metadata: dict[str, str] | None


class AddItemsBody(msgspec.Struct):
    """Body of a request to add items."""

    items: list[dict[str, Any]]


MAX_ITEMS = 20
"""Greatest number of items that a request adds, as OpenAI's."""
MAX_VALUES = 100_000

_CREATE_PARAMETERS = Parameters(CreateBody, max_items={"items": MAX_ITEMS}, max_values=MAX_VALUES)
_UPDATE_PARAMETERS = Parameters(UpdateBody, max_values=MAX_VALUES)
_ADD_PARAMETERS = Parameters(AddItemsBody, max_items={"items": MAX_ITEMS}, max_values=MAX_VALUES)


class ConversationEndpoints:
    """Handlers of the paths of conversations."""

    def __init__(self, conversations: NamedConversations) -> None:
        self._conversations = conversations

    def _owned(self, exchange: Exchange) -> NamedConversations:
        return self._conversations.of(principal_of(exchange.caller).name)

    async def create(self, exchange: Exchange) -> None:
        """``POST /v1/conversations``; a body may be left out."""
        body = await exchange.read_body(self._conversations.max_bytes) or b"{}"
        asked, _ = _CREATE_PARAMETERS.decode(body)
        await _reply(exchange, await self._owned(exchange).create(_items(body), asked.metadata or {}))

    async def get(self, exchange: Exchange) -> None:
        """``GET /v1/conversations/{id}``."""
        await _reply(exchange, await self._owned(exchange).get(_parts(exchange, 1)[0]))

    async def update(self, exchange: Exchange) -> None:
        """``POST /v1/conversations/{id}``: other metadata."""
        (id,) = _parts(exchange, 1)
        asked, _ = _UPDATE_PARAMETERS.decode(await exchange.read_body(self._conversations.max_bytes))
        await _reply(exchange, await self._owned(exchange).update(id, asked.metadata or {}))

    async def delete(self, exchange: Exchange) -> None:
        """``DELETE /v1/conversations/{id}``; its responses stay."""
        (id,) = _parts(exchange, 1)
        await self._owned(exchange).delete(id)
        await _reply(exchange, {"id": id, "object": "conversation.deleted", "deleted": True})

    async def items(self, exchange: Exchange) -> None:
        """``GET /v1/conversations/{id}/items``."""
        found = await self._owned(exchange).items(_parts(exchange, 2)[0])
        await exchange.reply(200, await aside(found, lambda: page_of(found, query_parameters(exchange.query))))

    async def add_items(self, exchange: Exchange) -> None:
        """``POST /v1/conversations/{id}/items``."""
        body = await exchange.read_body(self._conversations.max_bytes)
        _ADD_PARAMETERS.decode(body)
        added = await self._owned(exchange).add_items(_parts(exchange, 2)[0], _items(body))
        limit = str(max(1, min(100, len(added))))
        await exchange.reply(200, page_of(added, {"order": "asc", "limit": limit}))

    async def item(self, exchange: Exchange) -> None:
        """``GET /v1/conversations/{id}/items/{item_id}``."""
        id, _, item_id = _parts(exchange, 3)
        await exchange.reply(200, await self._owned(exchange).item(id, item_id))

    async def delete_item(self, exchange: Exchange) -> None:
        """``DELETE /v1/conversations/{id}/items/{item_id}``: the response is the conversation."""
        id, _, item_id = _parts(exchange, 3)
        await _reply(exchange, await self._owned(exchange).delete_item(id, item_id))


def _items(body: bytes) -> list[dict[str, Any]]:
    """Return the items of a body whose types have been checked, with numbers that can be encoded again."""
    found: list[dict[str, Any]] = orjson.loads(body).get("items") or []
    return found


def _parts(exchange: Exchange, count: int) -> Sequence[str]:
    parts = exchange.path.removeprefix(PREFIX).split("/")
    assert len(parts) == count  # the path was matched
    return parts


async def _reply(exchange: Exchange, value: object) -> None:
    await exchange.reply(200, orjson.dumps(value))
