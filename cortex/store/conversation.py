"""Conversations by reference: a request that continues a stored response becomes one that says all of it.

What a turn inherits is the items of the turns before it, not their instructions. A request that refers to nothing
goes on as it came; its answer is kept unless it says ``store: false``. An answer is kept before its end reaches the
client, who may continue it at once; that it could not be kept is logged, and costs nobody the answer.
"""

import logging
import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from cortex._fast.peek import Peek
from cortex._fast.sse import FrameDecoder
from cortex.dialects.passthrough import PREVIOUS_HEADER, STORES_HEADER
from cortex.errors import PreviousResponseNotFoundError, ResponseNotFoundError, StoreUnavailableError
from cortex.store import items
from cortex.store.interface import ResponseStore, StoredResponse, StoreError
from cortex.wire.errors import InvalidRequestError, InvalidTypeError

log = logging.getLogger("cortex.store")

MAX_TURNS = 4096
"""Of one chain; a longer one does not fit any context."""

_ID = re.compile(r"resp_[A-Za-z0-9_-]{1,120}")
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]+)_\d+")
_KEPT = (b"response.completed", b"response.incomplete")
Said = MutableMapping[str, tuple[msgspec.Raw, ...]]
"""Whole conversations by the id of their last response: what a connection remembers."""

MAX_SAID = 8
"""Conversations a connection remembers, the latest."""

_ANSWER = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Turn:
    """One request on its way: what is sent on, and what is kept when it has been answered."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    previous: str = ""
    items: tuple[dict[str, Any], ...] = ()
    """The request's own."""
    chain: tuple[str, ...] = ()
    """The stored responses before it, the latest first."""
    before: tuple[msgspec.Raw, ...] = ()
    """What was said before it, for a connection to remember."""
    is_remembered_only: bool = False
    """Whether no store knows what was said before it."""
    stores: bool = False
    said: Said | None = None
    """What the connection remembers, where it is one that does."""


class Conversations:
    """The stored responses of a gateway; without a store it knows only what a connection remembers."""

    def __init__(self, store: ResponseStore | None) -> None:
        self._store = store

    async def begin(self, body: bytes, found: Peek, said: Said | None = None) -> Turn:
        """Return how a request goes on. ``found`` was found in the body before the model's name was spliced in.

        ``said`` is what the request's connection remembers: there its answer is kept too, whatever is stored.

        Raises:
            PreviousResponseNotFoundError: it continues a response that is not there.
            InvalidRequestError: its input is none, or refers to an item that is not there.
            StoreUnavailableError: the store failed.
        """
        stores = found.stores and self._store is not None
        if self._store is None and said is None:
            return Turn(body)  # the node refuses what refers to something
        previous = found.previous_response_id or ""
        refers = b'"item_reference"' in body
        if not (previous or refers or stores or said is not None):
            return Turn(body)
        try:
            own = items.input_items(body)
        except InvalidTypeError:
            if previous or refers:
                raise
            return Turn(body)  # for the node to refuse
        if refers:
            own = [await self._resolve(item) for item in own]
        headers: tuple[tuple[bytes, bytes], ...] = ((STORES_HEADER, b"1"),) if stores else ()
        chain: tuple[str, ...] = ()
        earlier: list[msgspec.Raw] = []
        remembered = said is not None and previous in said
        if said is not None and remembered:
            earlier = list(said[previous])
            if stores and await self._get(previous) is not None:
                chain, remembered = (await self._said(previous))[0], False
        elif previous:
            chain, earlier = await self._said(previous)
        if previous or refers:
            body = items.with_input(body, [*earlier, *(msgspec.Raw(orjson.dumps(item)) for item in own)])
            if previous:
                headers += ((PREVIOUS_HEADER, previous.encode()),)
        before = tuple(earlier) if said is not None else ()
        return Turn(body, headers, previous, tuple(own), chain, before, remembered, stores, said)

    async def keep(self, turn: Turn, response: bytes) -> None:
        """Keep the response that answered ``turn``, if it is one, where it is to be kept."""
        if not turn.stores and turn.said is None:
            return
        try:
            id = msgspec.json.decode(_ANSWER.decode(response)["id"], type=str)
        except (msgspec.DecodeError, KeyError):
            log.warning("an answer that is no response was not kept")
            return
        if turn.said is not None:
            own = (msgspec.Raw(orjson.dumps(item)) for item in turn.items)
            turn.said[id] = (*turn.before, *own, *items.output_items(response))
            if len(turn.said) > MAX_SAID:
                del turn.said[next(iter(turn.said))]
        if not turn.stores or self._store is None:
            return
        own_items = list(turn.items)
        if turn.is_remembered_only:
            own_items = [*(orjson.loads(bytes(item)) for item in turn.before), *own_items]
        kept = StoredResponse(
            "" if turn.is_remembered_only else turn.previous,
            msgspec.Raw(items.listed(own_items)),
            msgspec.Raw(response),
        )
        try:
            await self._store.put(id, kept, turn.chain)
        except StoreError as error:
            log.error("response %s was not kept: %s", id, error)

    async def keep_streamed(self, turn: Turn, frames: bytes) -> None:
        """Keep the response in the last frames of a stream; one that failed is not kept."""
        if not turn.stores and turn.said is None:
            return
        for frame in FrameDecoder(len(frames) + 1).feed(frames):
            if frame.event in _KEPT:
                await self.keep(turn, bytes(_ANSWER.decode(frame.data)["response"]))

    async def get(self, id: str) -> StoredResponse:
        """Return a stored response. Raises :class:`ResponseNotFoundError`, :class:`StoreUnavailableError`."""
        stored = await self._get(id)
        if stored is None:
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")
        return stored

    async def delete(self, id: str) -> None:
        """Forget a stored response. Raises as :meth:`get` does."""
        try:
            was_there = self._store is not None and await self._store.delete(id)
        except StoreError as error:
            raise _unavailable(error) from error
        if not was_there:
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")

    async def input_items(self, id: str, query: dict[str, str]) -> bytes:
        """Return a page of the items of a response's own input, the latest first unless asked otherwise.

        Raises:
            InvalidRequestError: ``limit``, ``order`` or ``after`` is wrong.
        """
        found: list[dict[str, Any]] = orjson.loads(bytes((await self.get(id)).items))
        order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
        if order not in ("asc", "desc"):
            raise InvalidRequestError("Invalid 'order': it is 'asc' or 'desc'.", param="order")
        if not limit.isdecimal() or not 1 <= int(limit) <= 100:
            raise InvalidRequestError("Invalid 'limit': it is between 1 and 100.", param="limit")
        if order == "desc":
            found.reverse()
        if after is not None:
            ids = [item["id"] for item in found]
            if after not in ids:
                raise InvalidRequestError(f"Invalid 'after': there is no item '{after}'.", param="after")
            found = found[ids.index(after) + 1 :]
        page = found[: int(limit)]
        return orjson.dumps(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(page) < len(found),
            }
        )

    async def _said(self, previous: str) -> tuple[tuple[str, ...], list[msgspec.Raw]]:
        """Return the ids of a chain that ends with ``previous``, and all that was said in it."""
        chain: list[str] = []
        turns: list[Sequence[msgspec.Raw]] = []
        id = previous
        while id:
            stored = await self._get(id) if len(chain) < MAX_TURNS else None
            if stored is None:
                raise PreviousResponseNotFoundError(
                    f"Previous response with id '{previous}' not found.", param="previous_response_id"
                )
            chain.append(id)
            own = msgspec.json.decode(stored.items, type=list[msgspec.Raw])
            turns.append([*own, *items.output_items(bytes(stored.body))])
            id = stored.previous
        return tuple(chain), [item for turn in reversed(turns) for item in turn]

    async def _resolve(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the output item that a reference means: its id says of which response it is."""
        if item.get("type") != "item_reference":
            return item
        id = item.get("id")
        if isinstance(id, str) and (match := _ITEM_ID.fullmatch(id)):
            stored = await self._get(f"resp_{match[1]}")
            for output in orjson.loads(bytes(stored.body))["output"] if stored else ():
                if output["id"] == id:
                    found: dict[str, Any] = output
                    return found
        raise InvalidRequestError(f"Item with id '{id}' not found.", param="input")

    async def _get(self, id: str) -> StoredResponse | None:
        if self._store is None or _ID.fullmatch(id) is None:
            return None
        try:
            return await self._store.get(id)
        except StoreError as error:
            raise _unavailable(error) from error


def _unavailable(error: StoreError) -> StoreUnavailableError:
    log.error("%s", error)
    return StoreUnavailableError("The store of responses does not answer.", retry_after_s=1)
