"""The paths of stored responses: what ``/v1/responses/{id}`` and the paths below it answer.

They concern the store alone; no node is asked. Without a store nothing is found.
"""

from collections.abc import Mapping

import orjson

from cortex.errors import ResponseNotFoundError
from cortex.http_io import Exchange, query_parameters
from cortex.store.conversation import Conversations
from cortex.wire.errors import InvalidRequestError, UnsupportedParameterError

PREFIX = "/v1/responses/"


class StoredEndpoints:
    """What answers at stored responses."""

    def __init__(self, conversations: Conversations | None) -> None:
        self._conversations = conversations

    async def get(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}``: the response as it was told."""
        id, conversations = self._find(exchange)
        stored = await conversations.get(id)
        if query_parameters(exchange.query).get("stream") == "true":
            raise UnsupportedParameterError(
                "Unsupported parameter: 'stream': a stored response is not told again as a stream.", param="stream"
            )
        await exchange.reply(200, bytes(stored.body))

    async def delete(self, exchange: Exchange) -> None:
        """``DELETE /v1/responses/{id}``."""
        id, conversations = self._find(exchange)
        await conversations.delete(id)
        await exchange.reply(200, orjson.dumps({"id": id, "object": "response", "deleted": True}))

    async def input_items(self, exchange: Exchange) -> None:
        """``GET /v1/responses/{id}/input_items``."""
        id, conversations = self._find(exchange, "/input_items")
        query: Mapping[str, str] = query_parameters(exchange.query)
        await exchange.reply(200, await conversations.input_items(id, dict(query)))

    async def cancel(self, exchange: Exchange) -> None:
        """``POST /v1/responses/{id}/cancel``: what is stored here has ended, and none ran in the background."""
        id, conversations = self._find(exchange, "/cancel")
        await conversations.get(id)
        raise InvalidRequestError("Cannot cancel a synchronous response.", param="response_id")

    def _find(self, exchange: Exchange, suffix: str = "") -> tuple[str, Conversations]:
        id = exchange.path.removeprefix(PREFIX).removesuffix(suffix)
        if self._conversations is None:
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")
        return id, self._conversations
