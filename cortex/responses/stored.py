"""Stored responses: a request that continues one gets the items of its chain, and its own response is stored.

A response inherits the items of the responses before it, not their instructions. A request without references is sent
on unchanged; its response is stored unless it has ``store: false``. A response is stored before its end reaches the
client, which may continue it at once; a failure to store it is logged, and the client still gets the response.
"""

import contextlib
import re
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

import msgspec

from cortex._fast.peek import Peek, PeekTypeError, peek
from cortex._fast.sse import SseDecoder
from cortex.dialects.responses.context import NO_CONTEXT, ResponseContext
from cortex.errors import NotAnAnswerError, ResponseNotFoundError, StoreFullError, StoreUnavailableError
from cortex.responses import items
from cortex.responses.chains import ADDED, RESPONSE, Chains, aside, check_length, is_reference, store_error
from cortex.responses.paging import page_of
from cortex.store.interface import StoredItems, StoredResponse
from cortex.wire.errors import InvalidRequestError, InvalidTypeError


class _Named(msgspec.Struct):
    id: str


class _Answer(msgspec.Struct):
    id: str
    output: msgspec.Raw = msgspec.Raw(b"[]")


_STORED_EVENTS = (b"response.completed", b"response.incomplete")
_ANSWER = msgspec.json.Decoder(_Answer)
_CONVERSATION = msgspec.json.Decoder(str | _Named | None)
_BOOLEAN = msgspec.json.Decoder(bool | None)
_MENTION = re.compile(rb'"(?:conversation|background|item_reference)"')
"""Pattern of what a body has that only a gateway understands."""

UNREADABLE = (msgspec.MsgspecError, KeyError, ValueError, RecursionError)
"""Exceptions of reading a node's response."""

History = MutableMapping[str, tuple[bytes, ...]]
"""Conversations of a connection by the id of their last response: JSON arrays of items, of all of the conversation."""


@dataclass(frozen=True, slots=True)
class PendingResponse:
    """A request on its way: the body for the node, and what is needed to store the response."""

    body: bytes
    context: ResponseContext = NO_CONTEXT
    own: bytes = b"[]"
    """Items of the request, as a JSON array in the form of a listing."""
    num_own: int = 0
    earlier: tuple[bytes, ...] = ()
    """Items before its own, as JSON arrays."""
    previous: str = ""
    """Id of the stored record that it continues; empty if what is before it is not stored."""
    chain_length: int = 1
    """Number of records of the chain that ends with its response."""
    history: History | None = None
    """Conversations of the connection, for a request on a WebSocket."""

    @property
    def is_kept(self) -> bool:
        """Whether the response is stored or added to a history."""
        return self.context.store or bool(self.context.conversation) or self.history is not None

    def record(self, response: bytes, output: bytes) -> StoredResponse:
        """Return a response in the form of the store. What is not stored before it becomes input of its own."""
        before = () if self.previous else self.earlier
        num_inputs = self.num_own + sum(len(items.split(array)) for array in before)
        found = items.joined([*before, self.own, output])
        return StoredResponse(self.previous, found, num_inputs, response, self.chain_length)


class StoredResponses(Chains):
    """The stored responses of a principal; without a store, those of the request's connection alone."""

    async def get(self, id: str) -> StoredResponse:
        """Return a stored response. Raises :class:`ResponseNotFoundError`, :class:`StoreUnavailableError`."""
        stored = await self.find(id)
        if not isinstance(stored, StoredResponse):
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")
        return stored

    async def delete(self, id: str) -> None:
        """Delete a stored response. Raises as :meth:`get` does."""
        if not (id.startswith(f"{RESPONSE}_") and await self.forget(id)):
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")

    async def input_items(self, id: str, query: Mapping[str, str]) -> bytes:
        """Return a page of the items of a response's own input. Raises as :func:`page_of` does."""
        stored = await self.get(id)
        return await aside(lambda: page_of(items.split(stored.items)[: stored.num_inputs], query), stored.items)

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
        stores = keeps and found.stores and self._store is not None
        concerns = found.previous_response_id or stores or _MENTION.search(body) is not None
        if history is None and (self._store is None or not concerns):
            return PendingResponse(body)  # without a store the node refuses references
        try:
            fields = items.FIELDS.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return PendingResponse(body)  # for the node to refuse
        context = self._context(fields, found.previous_response_id or "", stores, len(body))
        is_changed = bool(context.conversation or context.background)
        param = "conversation" if context.conversation else "previous_response_id"
        try:
            given = items.input_items(fields.get("input"))
        except InvalidTypeError:
            if context.previous_response_id or is_changed:
                raise
            return PendingResponse(body)  # for the node to refuse
        refers = any(map(is_reference, given))
        if not (context.store or is_changed or context.previous_response_id or refers or history is not None):
            return PendingResponse(body)
        if refers:
            given = await self.resolve_references(given)
        pending = await self._after_earlier(context, history)
        if keeps:
            check_length(pending.chain_length - 1, param)
        own = await aside(lambda: items.listed(given), body, num_items=len(given))
        if pending.earlier or refers:
            sent = msgspec.json.encode(given)
            if sum(map(len, pending.earlier)) + len(sent) > self.max_bytes:
                raise self.too_large(param if pending.earlier else "input")
            fields["input"] = msgspec.Raw(items.joined([*pending.earlier, sent]))
        if is_changed or refers or context.previous_response_id:
            fields.pop("previous_response_id", None)
            body = msgspec.json.encode(fields)
        return replace(pending, body=body, own=own, num_own=len(given))

    def _context(self, fields: dict[str, msgspec.Raw], previous: str, stores: bool, size_bytes: int) -> ResponseContext:
        """Return what a gateway decides of a response, and take the members for gateways out of the request's fields.

        A background response is generated as a stream, which can be followed.
        """
        conversation, background = "", False
        if self._store is not None:
            with contextlib.suppress(msgspec.DecodeError):  # for the node to refuse
                named = _CONVERSATION.decode(fields.get("conversation", b"null"))
                background = _BOOLEAN.decode(fields.get("background", b"null")) or False
                conversation = named.id if isinstance(named, _Named) else named or ""
                fields.pop("conversation", None)
                fields.pop("background", None)
        if stores and self._store is not None and (obstacle := self._store.obstacle(size_bytes)) is not None:
            error = store_error(obstacle)
            if conversation or background or bytes(fields.get("store", b"")) == b"true":
                raise error
            stores = False  # by default only, and the response has ``store: false``
        if background:
            fields["stream"] = msgspec.Raw(b"true")
            if not stores:
                raise InvalidRequestError("Invalid 'background': it needs 'store' to be true.", param="background")
        if conversation and previous:
            raise InvalidRequestError(
                "Invalid 'conversation': a response continues one or a previous response, not both.",
                param="conversation",
            )
        id = f"{RESPONSE}_{secrets.token_hex(24)}" if background else ""
        return ResponseContext(id, stores, previous, background, conversation)

    async def _after_earlier(self, context: ResponseContext, history: History | None) -> PendingResponse:
        """Return the request with what is before it, still without its body and its own items."""
        last, param = context.previous_response_id, "previous_response_id"
        if context.conversation:
            stored = await self.conversation(context.conversation)
            last, earlier = stored.last, await self.load_conversation(stored, self.max_bytes)
        elif history is not None and last in history:
            earlier = history[last]
            found = await self.find(last) if context.store else None
            length = found.chain_length if isinstance(found, StoredResponse) else 0
            return PendingResponse(b"", context, b"", 0, earlier, last if length else "", length + 1, history)
        else:
            earlier = await self.load(last, param, self.max_bytes)
        return PendingResponse(b"", context, b"", 0, earlier, last, len(earlier) + 1, history)

    async def keep(self, pending: PendingResponse, response: bytes) -> bytes:
        """Store a response, and add it to the history, as ``pending`` asks.

        Returns it for the client: one that could not be stored has ``store: false``.

        Raises:
            NotAnAnswerError: it has no id or no list of items.
        """
        if not pending.is_kept:
            return response
        try:
            answer = _ANSWER.decode(response)
            items.check(answer.output)
        except UNREADABLE:
            raise NotAnAnswerError("The node answered with a response without an id or a list of items.") from None
        output = bytes(answer.output)
        if pending.history is not None:
            pending.history[answer.id] = (*pending.earlier, pending.own, output)
        if not (pending.context.store or pending.context.conversation):
            return response
        if not answer.id.startswith(f"{RESPONSE}_"):
            return not_stored(response)  # it could take the place of another record
        try:
            await self.settle(pending, answer.id, pending.record(response, output))
        except (StoreUnavailableError, StoreFullError):  # logged already
            return not_stored(response)
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
                    response = bytes(items.FIELDS.decode(sse_event.data)["response"])
                    with contextlib.suppress(PeekTypeError):
                        peek(response)  # deeper nesting could not be listed again
                except UNREADABLE:
                    raise NotAnAnswerError("The node ended its stream without a response in its last event.") from None
                kept = await self.keep(pending, response)
                if kept is not response:
                    sse_events = sse_events.replace(response, kept, 1)
        return sse_events

    async def settle(self, pending: PendingResponse, id: str, stored: StoredResponse) -> None:
        """Store a response that has ended, and let its conversation end with it.

        Raises:
            StoreUnavailableError: the store failed.
            StoreFullError: the store has no room for it.
        """
        conversation = pending.context.conversation
        if pending.context.store:
            await self.put(id, stored)
        elif conversation:
            id = f"{ADDED}_{secrets.token_hex(24)}"
            await self.put(id, StoredItems(stored.previous, stored.items, stored.chain_length))
        if conversation:
            name = await self.conversation(conversation)
            await self.put(conversation, msgspec.structs.replace(name, last=id))


def output_of(response: bytes) -> bytes:
    """Return the output of a response as a JSON array of items. Raises as :data:`UNREADABLE` says."""
    answer = _ANSWER.decode(response)
    items.check(answer.output)
    return bytes(answer.output)


def not_stored(response: bytes) -> bytes:
    """Return a response with ``store: false``."""
    fields = items.FIELDS.decode(response)
    if bytes(fields.get("store", b"false")) == b"false":
        return response
    fields["store"] = msgspec.Raw(b"false")
    return msgspec.json.encode(fields)
