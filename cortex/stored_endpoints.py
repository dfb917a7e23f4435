"""The paths of stored responses: ``/v1/responses/{id}`` and the paths below it.

No node takes part. Without a store no response is found.
"""

from collections.abc import Mapping

import orjson

from cortex.access.authenticator import principal_of
from cortex.dialects.registry import RESPONSES
from cortex.event_stream import stream
from cortex.http_io import Exchange, query_parameters
from cortex.responses.background import Background
from cortex.store.conversation import Conversations
from cortex.wire.errors import InvalidRequestError

PREFIX = "/v1/responses/"


class StoredEndpoints:
    """Handlers of the paths of stored responses."""

    def __init__(self, conversations: Conversations, background: Background) -> None:
        self._conversations = conversations
        self._background = background

    async def get(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}``: the response as it is now, or the SSE events of its stream from a number on."""
        id, query = _id(exchange), query_parameters(exchange.query)
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
        id, owned = _id(exchange), self._owned(exchange)
        await self._background.end(owned, id)
        await owned.delete(id)
        await exchange.reply(200, orjson.dumps({"id": id, "object": "response", "deleted": True}))

    async def input_items(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}/input_items``."""
        query: Mapping[str, str] = query_parameters(exchange.query)
        id = _id(exchange, "/input_items")
        await exchange.reply(200, await self._owned(exchange).input_items(id, dict(query)))

    async def cancel(self, exchange: Exchange) -> None:
        """``POST /v1/responses/{id}/cancel``, for a background response."""
        await exchange.reply(200, await self._background.cancel(self._owned(exchange), _id(exchange, "/cancel")))

    def _owned(self, exchange: Exchange) -> Conversations:
        return self._conversations.of(principal_of(exchange.caller).name)


def _id(exchange: Exchange, suffix: str = "") -> str:
    return exchange.path.removeprefix(PREFIX).removesuffix(suffix)
