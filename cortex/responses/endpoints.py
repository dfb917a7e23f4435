"""The paths of stored responses and of conversations: ``/v1/responses/{id}``, ``/v1/conversations`` and those below.

No node takes part. Without a store none is found.
"""

from typing import Any

import msgspec
import orjson

from cortex.access.authenticator import principal_of
from cortex.dialects.parameters import Parameters
from cortex.dialects.registry import RESPONSES
from cortex.event_stream import stream
from cortex.http_io import Exchange, query_parameters
from cortex.responses import items
from cortex.responses.background import Background
from cortex.responses.chains import aside
from cortex.responses.conversations import Conversations
from cortex.responses.items import Item
from cortex.responses.paging import page_of
from cortex.responses.stored import StoredResponses
from cortex.wire.errors import InvalidRequestError


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


class ResponseEndpoints:
    """Handlers of the paths of stored responses."""

    def __init__(self, responses: StoredResponses, background: Background) -> None:
        self._responses = responses
        self._background = background

    async def get(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}``: the response as it is now, or the SSE events of its stream from a number on."""
        id, query = _part(exchange), query_parameters(exchange.query)
        if query.get("stream") != "true":
            await exchange.reply(200, await self._background.response(self._owned(exchange), id))
            return
        after = query.get("starting_after", "-1")
        if not (after.isdecimal() or after == "-1"):
            raise InvalidRequestError("Invalid 'starting_after': it is the number of an event.", param="starting_after")
        sse_events = await self._background.follow(self._owned(exchange), id, int(after))
        await stream(
            exchange,
            sse_events,
            heartbeat=RESPONSES.heartbeat,
            error_event=lambda error: RESPONSES.failure(error.info(), b"", b""),
        )

    async def delete(self, exchange: Exchange) -> None:
        """``DELETE /v1/responses/{id}``."""
        id, owned = _part(exchange), self._owned(exchange)
        await self._background.end(owned, id)
        await owned.delete(id)
        await exchange.reply(200, orjson.dumps({"id": id, "object": "response", "deleted": True}))

    async def input_items(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}/input_items``."""
        owned, query = self._owned(exchange), query_parameters(exchange.query)
        await exchange.reply(200, await owned.input_items(_part(exchange), query))

    async def cancel(self, exchange: Exchange) -> None:
        """``POST /v1/responses/{id}/cancel``, for a background response."""
        await exchange.reply(200, await self._background.cancel(self._owned(exchange), _part(exchange)))

    def _owned(self, exchange: Exchange) -> StoredResponses:
        return self._responses.of(_owner(exchange))


class ConversationEndpoints:
    """Handlers of the paths of conversations."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    async def create(self, exchange: Exchange) -> None:
        """``POST /v1/conversations``; a body may be left out."""
        body = await exchange.read_body(self._conversations.max_bytes) or b"{}"
        asked, _ = _CREATE_PARAMETERS.decode(body)
        await exchange.reply(200, await self._owned(exchange).create(_items(body), asked.metadata or {}))

    async def get(self, exchange: Exchange) -> None:
        """``GET /v1/conversations/{id}``."""
        await exchange.reply(200, await self._owned(exchange).get(_part(exchange)))

    async def update(self, exchange: Exchange) -> None:
        """``POST /v1/conversations/{id}``: other metadata."""
        asked, _ = _UPDATE_PARAMETERS.decode(await exchange.read_body(self._conversations.max_bytes))
        await exchange.reply(200, await self._owned(exchange).update(_part(exchange), asked.metadata or {}))

    async def delete(self, exchange: Exchange) -> None:
        """``DELETE /v1/conversations/{id}``; its responses stay."""
        id = _part(exchange)
        await self._owned(exchange).delete(id)
        await exchange.reply(200, orjson.dumps({"id": id, "object": "conversation.deleted", "deleted": True}))

    async def items(self, exchange: Exchange) -> None:
        """``GET /v1/conversations/{id}/items``."""
        found = await self._owned(exchange).items(_part(exchange))
        query = query_parameters(exchange.query)
        await exchange.reply(200, await aside(lambda: page_of(items.split(found), query), found))

    async def add_items(self, exchange: Exchange) -> None:
        """``POST /v1/conversations/{id}/items``."""
        body = await exchange.read_body(self._conversations.max_bytes)
        _ADD_PARAMETERS.decode(body)
        added = items.split(await self._owned(exchange).add_items(_part(exchange), _items(body)))
        await exchange.reply(200, page_of(added, {"order": "asc", "limit": str(max(1, len(added)))}))

    async def item(self, exchange: Exchange) -> None:
        """``GET /v1/conversations/{id}/items/{item_id}``."""
        await exchange.reply(200, await self._owned(exchange).item(_part(exchange), _part(exchange, 5)))

    async def delete_item(self, exchange: Exchange) -> None:
        """``DELETE /v1/conversations/{id}/items/{item_id}``: the response is the conversation."""
        await exchange.reply(200, await self._owned(exchange).delete_item(_part(exchange), _part(exchange, 5)))

    def _owned(self, exchange: Exchange) -> Conversations:
        return self._conversations.of(_owner(exchange))


def _owner(exchange: Exchange) -> str:
    return principal_of(exchange.caller).name


def _part(exchange: Exchange, number: int = 3) -> str:
    """Return a part of a path that was matched, by default its first id."""
    return exchange.path.split("/")[number]


def _items(body: bytes) -> list[Item]:
    """Return the items of a body whose types have been checked."""
    given = items.FIELDS.decode(body).get("items")
    return items.input_items(given) if given is not None and bytes(given) != b"null" else []
