"""The paths of stored responses: what ``/v1/responses/{id}`` and the paths below it answer.

They concern the store alone; no node is asked. Without a store nothing is found.
"""

from collections.abc import Mapping

import orjson

from cortex.http_io import Exchange, query_parameters
from cortex.store.conversation import Conversations
from cortex.wire.errors import InvalidRequestError, UnsupportedParameterError

PREFIX = "/v1/responses/"


class StoredEndpoints:
    """What answers at stored responses."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    async def get(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}``: the response as it was told."""
        stored = await self._conversations.get(_id(exchange))
        if query_parameters(exchange.query).get("stream") == "true":
            raise UnsupportedParameterError(
                "Unsupported parameter: 'stream': a stored response is not told again as a stream.", param="stream"
            )
        await exchange.reply(200, bytes(stored.body))

    async def delete(self, exchange: Exchange) -> None:
        """``DELETE /v1/responses/{id}``."""
        id = _id(exchange)
        await self._conversations.delete(id)
        await exchange.reply(200, orjson.dumps({"id": id, "object": "response", "deleted": True}))

    async def input_items(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}/input_items``."""
        query: Mapping[str, str] = query_parameters(exchange.query)
        await exchange.reply(200, await self._conversations.input_items(_id(exchange, "/input_items"), dict(query)))

    async def cancel(self, exchange: Exchange) -> None:
        """``POST /v1/responses/{id}/cancel``: what is stored here has ended, and none ran in the background."""
        await self._conversations.get(_id(exchange, "/cancel"))
        raise InvalidRequestError("Cannot cancel a synchronous response.", param="response_id")


def _id(exchange: Exchange, suffix: str = "") -> str:
    return exchange.path.removeprefix(PREFIX).removesuffix(suffix)
