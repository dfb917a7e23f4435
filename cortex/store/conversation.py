"""Conversations by reference: a request that continues a stored response gets the items of its chain.

A response inherits the items of the responses before it, not their instructions. A request without references is sent
on unchanged; its response is stored unless it has ``store: false``. A response is stored before its end reaches the
client, which may continue it at once; a failure to store it is logged, and the client still gets the response.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from cortex._fast.peek import Peek, PeekTypeError, peek
from cortex._fast.sse import SseDecoder
from cortex.dialects.responses.context import NO_CONTEXT, ResponseContext
from cortex.errors import NotAnAnswerError, ResponseNotFoundError, StoreFullError, StoreUnavailableError
from cortex.store import items
from cortex.store.chains import (
    MAX_ITEMS_AT_ONCE,
    RESPONSE,
    UNANSWERED,
    UNREADABLE,
    Chains,
    aside,
    check_length,
    store_error,
)
from cortex.store.interface import StoredResponse
from cortex.store.paging import page_of
from cortex.wire.errors import InvalidRequestError, InvalidTypeError


class _Named(msgspec.Struct):
    id: str


_STORED_EVENTS = (b"response.completed", b"response.incomplete")
_FIELDS = ("conversation", "background")
"""Members of a body that only a gateway understands."""

History = MutableMapping[str, tuple[msgspec.Raw, ...]]
"""Conversations of a connection, each whole, by the id of its last response."""

_ANSWER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NAMED = msgspec.json.Decoder(str | _Named | None)


@dataclass(frozen=True, slots=True)
class PendingResponse:
    """A request on its way: the body for the node, and what is needed to store the response."""

    body: bytes
    context: ResponseContext = NO_CONTEXT
    previous: str = ""
    """Id of the stored response that it continues."""
    items: tuple[dict[str, Any], ...] = ()
    """Items to store: the request's own, and the earlier ones if these are not stored."""
    chain: tuple[str, ...] = ()
    """Ids of the stored responses before it, the latest first."""
    history: History | None = None
    """Conversations of the connection, for a request on a WebSocket."""
    earlier_items: tuple[msgspec.Raw, ...] = ()
    """Items before those of ``items``, for ``history``."""

    @property
    def is_kept(self) -> bool:
        """Whether the response is stored or added to a history."""
        return self.context.store or bool(self.context.conversation) or self.history is not None

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Headers for the node."""
        return self.context.headers()


class Conversations(Chains):
    """The conversations of a principal; without a store, those of the request's connection alone."""

    async def get(self, id: str) -> StoredResponse:
        """Return a stored response. Raises :class:`ResponseNotFoundError`, :class:`StoreUnavailableError`."""
        stored = await self._get(id) if id.startswith(f"{RESPONSE}_") else None
        if stored is None:
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")
        return stored

    async def delete(self, id: str) -> None:
        """Delete a stored response. Raises as :meth:`get` does."""
        if not (id.startswith(f"{RESPONSE}_") and await self.forget(id)):
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")

    async def input_items(self, id: str, query: Mapping[str, str]) -> bytes:
        """Return a page of the items of a response's own input. Raises as :func:`page_of` does."""
        found = items.kept_items((await self.get(id)).items)
        return await aside(found, lambda: page_of(found, query))

    async def begin(
        self, body: bytes, found: Peek, history: History | None = None, *, keeps: bool = True
    ) -> PendingResponse:
        """Prepare a request. ``found`` was read from the body before the model's name was spliced in.

        ``history`` holds the conversations of the request's connection; the answer is added to it, stored or not.
        Without ``keeps`` the answer cannot be continued.

        Raises:
            PreviousResponseNotFoundError: it continues an absent response.
            ConversationNotFoundError: its conversation is absent.
            ConversationTooLargeError: the conversation exceeds ``max_bytes``.
            ConversationFullError: the chain has its greatest length.
            InvalidRequestError: its input is wrong, or refers to an absent item.
            StoreFullError: the store is full, and the request has ``store: true``.
            StoreUnavailableError: the store failed.
        """
        if self._store is None and history is None:
            return PendingResponse(body)  # the node refuses references
        previous, stores = found.previous_response_id or "", keeps and found.stores and self._store is not None
        if stores and self._store is not None and (obstacle := self._store.obstacle(len(body))) is not None:
            error = store_error(obstacle)
            if _wants_store(body) or _has_fields(body):
                raise error
            stores = False  # by default only, and the response has ``store: false``
        conversation, background = "", False
        if self._store is not None and _has_fields(body):
            body, conversation, background = _without_fields(body, stores)
            if conversation and previous:
                raise InvalidRequestError(
                    "Invalid 'conversation': a response continues one or a previous response, not both.",
                    param="conversation",
                )
        refers = b'"item_reference"' in body
        if not (previous or conversation or refers or stores or history is not None):
            return PendingResponse(body)
        try:
            own = items.input_items(body)
        except InvalidTypeError:
            if previous or conversation or refers or background:
                raise
            return PendingResponse(body)  # for the node to refuse
        if refers:
            own = await self.resolve_references(own)
        context = ResponseContext(
            id=f"{RESPONSE}_{secrets.token_hex(24)}" if background else "",
            store=stores,
            previous_response_id=previous,
            background=background,
            conversation=conversation,
        )
        chain, earlier, is_stored = await self._before(context, history)
        if keeps:
            check_length(chain, "conversation" if conversation else "previous_response_id")
        if earlier or previous or conversation or refers:
            own_items = [msgspec.Raw(orjson.dumps(item)) for item in own]
            if items.size_of(earlier) + items.size_of(own_items) > self.max_bytes:
                raise self.too_large(
                    "conversation" if conversation else "previous_response_id" if previous else "input"
                )
            body = items.with_input(body, [*earlier, *own_items])
        kept = own if is_stored else [*(orjson.loads(bytes(item)) for item in earlier), *own]
        return PendingResponse(
            body,
            context,
            chain[0] if chain else "",
            tuple(kept),
            chain,
            history,
            tuple(earlier) if history is not None and is_stored else (),
        )

    async def _before(
        self, context: ResponseContext, history: History | None
    ) -> tuple[tuple[str, ...], list[msgspec.Raw], bool]:
        """Return the chain before a request, its items, and whether they are stored."""
        if context.conversation:
            name = await self.name(context.conversation)
            if not name.previous:
                return (), [], True
            return *await self.load_named(name, is_bounded=True), True
        previous = context.previous_response_id
        if not previous:
            return (), [], True
        if history is None or previous not in history:
            return *await self.load_chain(previous), True
        if context.store and await self._get(previous) is not None:
            return (await self.load_chain(previous))[0], list(history[previous]), True
        return (), list(history[previous]), not context.store

    async def keep(self, pending: PendingResponse, response: bytes) -> bytes:
        """Store a response, and add it to the history, as ``pending`` asks.

        Returns it for the client: one that could not be stored has ``store: false``.

        Raises:
            NotAnAnswerError: it has no id or no list of items.
        """
        if not pending.is_kept:
            return response
        try:
            with contextlib.suppress(PeekTypeError):  # its errors come when all of the response has been read
                peek(response)  # deeper nesting could not be listed again
            id = msgspec.json.decode(_ANSWER.decode(response)["id"], type=str)
            items.check_output(response)
        except UNREADABLE:
            raise NotAnAnswerError("The node answered with a response without an id or a list of items.") from None
        if pending.history is not None:
            own = (msgspec.Raw(orjson.dumps(item)) for item in pending.items)
            pending.history[id] = (*pending.earlier_items, *own, *items.output_items(response))
        try:
            if len(pending.items) > MAX_ITEMS_AT_ONCE:
                stored = await asyncio.to_thread(self.stored, pending, response)
            else:
                stored = self.stored(pending, response)
            await self.settle(pending, id, stored)
        except (StoreUnavailableError, StoreFullError):  # logged already
            return _not_stored(response)
        return response

    async def keep_streamed(self, pending: PendingResponse, sse_events: bytes) -> bytes:
        """Store the response in the last SSE events of a stream, and return these; a failed one is not stored.

        Raises:
            NotAnAnswerError: the events have no response.
        """
        if not pending.is_kept:
            return sse_events
        for sse_event in SseDecoder(len(sse_events) + 1).feed(sse_events):
            if sse_event.event in _STORED_EVENTS:
                try:
                    response = bytes(_ANSWER.decode(sse_event.data)["response"])
                except UNREADABLE:
                    raise NotAnAnswerError("The node ended its stream without a response in its last event.") from None
                kept = await self.keep(pending, response)
                if kept is not response:
                    sse_events = sse_events.replace(response, kept, 1)
        return sse_events

    def stored(self, pending: PendingResponse, response: bytes) -> StoredResponse:
        """Return a response in the form of the store."""
        return StoredResponse(pending.previous, items.listed(list(pending.items)), response)

    async def settle(self, pending: PendingResponse, id: str, stored: StoredResponse) -> None:
        """Store a response that has ended, and let its conversation end with it.

        Raises:
            StoreUnavailableError: the store failed.
        """
        if not pending.context.store:
            if not pending.context.conversation:
                return
            id = f"{UNANSWERED}_{secrets.token_hex(24)}"
        await self.put(id, stored, pending.chain)
        if pending.context.conversation:
            name = await self.name(pending.context.conversation)
            await self.put(pending.context.conversation, msgspec.structs.replace(name, previous=id))


def _without_fields(body: bytes, stores: bool) -> tuple[bytes, str, bool]:
    """Return a body without the members for gateways, the id of its conversation, and whether it is for the background.

    A background response is generated as a stream, which can be followed.
    """
    try:
        given = _ANSWER.decode(body)
        named = _NAMED.decode(given.pop("conversation", msgspec.Raw(b"null")))
        background = msgspec.json.decode(given.pop("background", msgspec.Raw(b"null")), type=bool | None) or False
    except msgspec.DecodeError:
        return body, "", False  # for the node to refuse
    if background:
        given["stream"] = msgspec.Raw(b"true")
        if not stores:
            raise InvalidRequestError("Invalid 'background': it needs 'store' to be true.", param="background")
    conversation = named.id if isinstance(named, _Named) else named or ""
    return msgspec.json.encode(given), conversation, background


def _has_fields(body: bytes) -> bool:
    """Return whether a body has a member for gateways at its top level."""
    if not any(b'"%b"' % name.encode() in body for name in _FIELDS):
        return False
    try:
        return not _ANSWER.decode(body).keys().isdisjoint(_FIELDS)
    except (msgspec.DecodeError, RecursionError):
        return False  # for the node to refuse


def _not_stored(response: bytes) -> bytes:
    """Return a response with ``store: false``."""
    fields = _ANSWER.decode(response)
    if bytes(fields.get("store", b"false")) == b"false":
        return response
    fields["store"] = msgspec.Raw(b"false")
    return msgspec.json.encode(fields)


def _wants_store(body: bytes) -> bool:
    """Return whether a body has ``store: true``."""
    if b'"store"' not in body:
        return False
    try:
        return bytes(_ANSWER.decode(body).get("store", b"")) == b"true"
    except msgspec.DecodeError:
        return False  # for the node to refuse
