"""Conversations by reference: a request that continues a stored response becomes one that says all of it.

What a turn inherits is the items of the turns before it, not their instructions. A request that refers to nothing
goes on as it came; its answer is kept unless it says ``store: false``. An answer is kept before its end reaches the
client, who may continue it at once; that it could not be kept is logged, and costs nobody the answer.
"""

import asyncio
import contextlib
import functools
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import orjson

from cortex._fast.peek import Peek, PeekTypeError, peek
from cortex._fast.sse import SseDecoder
from cortex.dialects.passthrough import NO_CONTEXT, ResponseContext
from cortex.errors import (
    ConversationFullError,
    ConversationNotFoundError,
    ConversationTooLargeError,
    NotAnAnswerError,
    PreviousResponseNotFoundError,
    ResponseNotFoundError,
    StoreFullError,
    StoreUnavailableError,
)
from cortex.store import interface, items
from cortex.store.interface import ResponseStore, StoredResponse, StoreError
from cortex.store.paging import page_of
from cortex.wire.errors import ApiError, InvalidRequestError, InvalidTypeError

log = logging.getLogger("cortex.store")

T = TypeVar("T")


class _Named(msgspec.Struct):
    id: str


MAX_CHAIN = 4096
"""Of one chain; a longer one does not fit any context."""
MAX_REFERENCES = 100
"""Items of other responses that one request refers to."""

RESPONSE, NAME, UNANSWERED = "resp", "conv", "turn"
"""What the id of something that is stored begins with: a response, a conversation's name, a turn without a response."""

_ID = re.compile(r"[a-z]+_[A-Za-z0-9_-]{1,120}")
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]+)_\d+")
_KEPT = (b"response.completed", b"response.incomplete")
_FIELDS = ("conversation", "background")

History = MutableMapping[str, tuple[msgspec.Raw, ...]]
"""Whole conversations by the id of their last response: what a connection remembers."""

MAX_ITEMS_AT_ONCE = 500
"""Items that are read, or made ready for the store, on the event loop; of more, a thread does it."""
MAX_BYTES_AT_ONCE = 1024 * 1024
"""Of items that are read there."""

UNREADABLE = (msgspec.MsgspecError, KeyError, ValueError, RecursionError)
"""What reading a node's response may raise."""

_ANSWER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NAMED = msgspec.json.Decoder(str | _Named | None)


@dataclass(frozen=True, slots=True)
class PendingResponse:
    """One request on its way: what is sent on, and what is kept when it has been answered."""

    body: bytes
    context: ResponseContext = NO_CONTEXT
    """What the gateway does with the response, for that to say."""
    previous: str = ""
    """The stored turn that it continues."""
    items: tuple[dict[str, Any], ...] = ()
    """The request's own; where no store knows what was said before it, that too."""
    chain: tuple[str, ...] = ()
    """The stored turns before it, the latest first."""
    history: History | None = None
    """What the connection remembers, where it is one that does."""
    earlier_items: tuple[msgspec.Raw, ...] = ()
    """What was said before the request's own items, for a connection to remember."""

    @property
    def is_kept(self) -> bool:
        """Whether its answer is kept anywhere."""
        return self.context.store or bool(self.context.conversation) or self.history is not None

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """What a node is told."""
        return self.context.headers()


class Conversations:
    """One principal's stored responses; without a store, only what a connection remembers is known.

    What is another's is not there.
    """

    def __init__(self, store: ResponseStore | None, owner: str = "", max_bytes: int = 32 * 1024 * 1024) -> None:
        self._store = store
        self.owner = owner
        self.max_bytes = max_bytes
        """Of what a request continues or refers to, with its own, as of a body."""

    def of(self, owner: str) -> "Conversations":
        """Return those of a principal, by its name."""
        return Conversations(self._store, owner, self.max_bytes) if owner != self.owner else self

    async def begin(
        self, body: bytes, found: Peek, history: History | None = None, *, keeps: bool = True
    ) -> PendingResponse:
        """Return how a request goes on. ``found`` was found in the body before the model's name was spliced in.

        ``history`` holds the conversations of the request's connection; the answer is added to it, stored or not.
        Without ``keeps`` the answer cannot be continued.

        Raises:
            PreviousResponseNotFoundError: it continues a response that is not there.
            ConversationNotFoundError: it is part of a conversation that is not there.
            ConversationTooLargeError: that is more than a body may be.
            ConversationFullError: that has as many turns as one may have.
            InvalidRequestError: its input is none, or refers to an item that is not there.
            StoreFullError: it is to be kept, and there is no room.
            StoreUnavailableError: the store failed.
        """
        if self._store is None and history is None:
            return PendingResponse(body)  # the node refuses what refers to something
        previous, stores = found.previous_response_id or "", keeps and found.stores and self._store is not None
        if stores and self._store is not None and (obstacle := self._store.obstacle(len(body))) is not None:
            if _wants_store(body) or _has_fields(body):
                raise _refusal(obstacle)
            stores = False  # nobody asked for it, and the answer says so
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
            own = await self._resolved(own)
        context = ResponseContext(
            id=f"{RESPONSE}_{secrets.token_hex(24)}" if background else "",
            store=stores,
            previous_response_id=previous,
            background=background,
            conversation=conversation,
        )
        chain, earlier, is_stored = await self._before(context, history)
        if keeps and len(chain) >= MAX_CHAIN:
            raise _full("conversation" if conversation else "previous_response_id")
        if earlier or previous or conversation or refers:
            own_items = [msgspec.Raw(orjson.dumps(item)) for item in own]
            if items.size_of(earlier) + items.size_of(own_items) > self.max_bytes:
                raise self._too_large(
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
        """Return the stored turns before a request, all that was said in them, and whether a store knows that."""
        if context.conversation:
            name = await self.name(context.conversation)
            if not name.previous:
                return (), [], True
            return *await self._load_named(name, is_bounded=True), True
        previous = context.previous_response_id
        if not previous:
            return (), [], True
        if history is None or previous not in history:
            return *await self._load_chain(previous), True
        if context.store and await self._get(previous) is not None:
            return (await self._load_chain(previous))[0], list(history[previous]), True
        return (), list(history[previous]), not context.store

    async def keep(self, pending: PendingResponse, response: bytes) -> bytes:
        """Keep the response that answered ``turn``, if it is one, where it is to be kept.

        Returns it as it is told: one that could not be kept says so.

        Raises:
            NotAnAnswerError: it is none that could be continued.
        """
        if not pending.is_kept:
            return response
        try:
            with contextlib.suppress(PeekTypeError):  # found when all of it has been read
                peek(response)  # what is nested deeper could not be listed again
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
        except (StoreUnavailableError, StoreFullError):  # it is in the log
            return _not_stored(response)
        return response

    async def keep_streamed(self, pending: PendingResponse, sse_events: bytes) -> bytes:
        """Keep the response in the last SSE events of a stream, and return them; one that failed is not kept.

        Raises:
            NotAnAnswerError: there is none in them.
        """
        if not pending.is_kept:
            return sse_events
        for sse_event in SseDecoder(len(sse_events) + 1).feed(sse_events):
            if sse_event.event in _KEPT:
                try:
                    response = bytes(_ANSWER.decode(sse_event.data)["response"])
                except UNREADABLE:
                    raise NotAnAnswerError("The node ended its stream without a response in its last event.") from None
                kept = await self.keep(pending, response)
                if kept is not response:
                    sse_events = sse_events.replace(response, kept, 1)
        return sse_events

    def stored(self, pending: PendingResponse, response: bytes) -> StoredResponse:
        """Return a turn with its answer, as it is kept."""
        return StoredResponse(pending.previous, msgspec.Raw(items.listed(list(pending.items))), msgspec.Raw(response))

    async def settle(self, pending: PendingResponse, id: str, stored: StoredResponse) -> None:
        """Keep a turn that has ended, and let the conversation it is part of end with it.

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

    async def put(self, id: str, stored: StoredResponse, chain: Sequence[str] = ()) -> None:
        """Keep something under an id. Raises :class:`StoreUnavailableError`."""
        if self._store is None:
            raise _unavailable(StoreError("there is none"))
        try:
            await self._store.put(id, msgspec.structs.replace(stored, owner=self.owner), chain)
        except StoreError as error:
            raise _refusal(error) from error

    async def find(self, id: str) -> StoredResponse | None:
        """Return what is kept under an id. Raises :class:`StoreUnavailableError`."""
        return await self._get(id)

    async def forget(self, id: str) -> bool:
        """Forget what is kept under an id; return whether there was anything. Raises :class:`StoreUnavailableError`."""
        if self._store is None or await self._get(id) is None:
            return False
        try:
            return await self._store.delete(id)
        except StoreError as error:
            raise _unavailable(error) from error

    async def name(self, id: str) -> StoredResponse:
        """Return what is kept of a conversation. Raises :class:`ConversationNotFoundError`."""
        stored = await self._get(id) if id.startswith(f"{NAME}_") else None
        if stored is None:
            raise ConversationNotFoundError(f"Conversation with id '{id}' not found.", param="conversation")
        return stored

    async def items_of(self, id: str) -> list[msgspec.Raw]:
        """Return all items of a conversation. Raises :class:`ConversationNotFoundError`."""
        return (await self._load_named(await self.name(id), is_bounded=False))[1]

    async def chain_of(self, name: StoredResponse) -> tuple[str, ...]:
        """Return the ids of a conversation's turns, the latest first.

        Raises:
            ConversationFullError: it can have no more.
            ConversationNotFoundError: one of them is not there any more.
        """
        found = [id async for id, _ in self._responses(name.previous, "conversation")]
        if len(found) >= MAX_CHAIN:
            raise _full("conversation")
        return tuple(found)

    async def _load_named(self, name: StoredResponse, *, is_bounded: bool) -> tuple[tuple[str, ...], list[msgspec.Raw]]:
        gone = frozenset(msgspec.json.decode(name.items, type=list[str]))
        return await self._load_chain(name.previous, gone, param="conversation", is_bounded=is_bounded)

    async def get(self, id: str) -> StoredResponse:
        """Return a stored response. Raises :class:`ResponseNotFoundError`, :class:`StoreUnavailableError`."""
        stored = await self._get(id) if id.startswith(f"{RESPONSE}_") else None
        if stored is None:
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")
        return stored

    async def delete(self, id: str) -> None:
        """Forget a stored response. Raises as :meth:`get` does."""
        if not (id.startswith(f"{RESPONSE}_") and await self.forget(id)):
            raise ResponseNotFoundError(f"Response with id '{id}' not found.", param="response_id")

    async def input_items(self, id: str, query: Mapping[str, str]) -> bytes:
        """Return a page of the items of a response's own input. Raises as :func:`page_of` does."""
        found = items.kept_items((await self.get(id)).items)
        return await aside(found, lambda: page_of(found, query))

    async def _load_chain(
        self,
        previous: str,
        gone: frozenset[str] = frozenset(),
        *,
        param: str = "previous_response_id",
        is_bounded: bool = True,
    ) -> tuple[tuple[str, ...], list[msgspec.Raw]]:
        """Return the ids of a chain that ends with ``previous``, and all that was said in it but what is ``gone``."""
        chain: list[str] = []
        responses: list[Sequence[msgspec.Raw]] = []
        size_bytes = 0
        async for id, stored in self._responses(previous, param):
            chain.append(id)
            try:
                own = [*items.kept_items(stored.items), *items.output_items(bytes(stored.body))]
            except UNREADABLE:
                log.error("what is stored as %s is damaged", id)
                raise _not_found(previous, param) from None
            if gone:
                own = await aside(own, functools.partial(_without, own, gone))
            size_bytes += items.size_of(own)
            if is_bounded and size_bytes > self.max_bytes:
                raise self._too_large(param)
            responses.append(own)
        return tuple(chain), [item for own in reversed(responses) for item in own]

    async def _responses(self, previous: str, param: str) -> AsyncGenerator[tuple[str, StoredResponse], None]:
        """Yield the turns of a chain, the latest first."""
        id, count = previous, 0
        while id:
            if count == MAX_CHAIN:
                raise _full(param)
            stored = await self._get(id)
            if stored is None:
                raise _not_found(previous, param)
            if stored.until:
                raise InvalidRequestError(
                    f"Response '{id}' is still being made: it cannot be continued yet.", param=param
                )
            yield id, stored
            id, count = stored.previous, count + 1

    def _too_large(self, param: str) -> ConversationTooLargeError:
        return ConversationTooLargeError(
            f"What was said before is, with this, more than {self.max_bytes} bytes: begin a new conversation with what "
            "still matters, or compact it.",
            param=param,
        )

    async def _resolved(self, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return items with what references mean in their place: the id of one says of which response it is."""
        rows: dict[str, Mapping[str, msgspec.Raw]] = {}
        found: list[dict[str, Any]] = []
        num_references = size_bytes = 0
        for item in own:
            if item.get("type") != "item_reference":
                found.append(item)
                continue
            num_references += 1
            if num_references > MAX_REFERENCES:
                raise InvalidRequestError(
                    f"Invalid 'input': it refers to more than {MAX_REFERENCES} items.", param="input"
                )
            id = item.get("id")
            match = _ITEM_ID.fullmatch(id) if isinstance(id, str) else None
            if match is not None and match[1] not in rows:
                rows[match[1]], row_bytes = await self._outputs(f"{RESPONSE}_{match[1]}")
                size_bytes += row_bytes
            meant = rows[match[1]].get(match[0]) if match is not None else None
            if meant is None:
                raise InvalidRequestError(f"Item with id '{str(id)[:200]}' not found.", param="input")
            size_bytes += items.size_of([meant])
            if size_bytes > self.max_bytes:
                raise self._too_large("input")
            found.append(orjson.loads(bytes(meant)))
        return found

    async def _outputs(self, id: str) -> tuple[Mapping[str, msgspec.Raw], int]:
        """Return the output items of a response by id, none if it is not there, and the bytes that hold them."""
        stored = await self._get(id)
        if stored is None:
            return {}, 0
        try:
            return {items.id_of(item): item for item in items.output_items(bytes(stored.body))}, len(bytes(stored.body))
        except UNREADABLE:
            log.error("what is stored as %s is damaged", id)
            return {}, 0

    async def _get(self, id: str) -> StoredResponse | None:
        if self._store is None or _ID.fullmatch(id) is None:
            return None
        try:
            stored = await self._store.get(id)
        except StoreError as error:
            raise _unavailable(error) from error
        return stored if stored is not None and stored.owner == self.owner else None


def _without_fields(body: bytes, stores: bool) -> tuple[bytes, str, bool]:
    """Return a body without what only a gateway understands, and that: a conversation's id, and whether it waits.

    What is made in the background is made as a stream, which can be followed.
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


async def aside(read: Sequence[msgspec.Raw], work: Callable[[], T]) -> T:
    """Return what ``work`` returns, which reads some items: many are no work for the event loop."""
    is_little = len(read) <= MAX_ITEMS_AT_ONCE and items.size_of(read) <= MAX_BYTES_AT_ONCE
    return work() if is_little else await asyncio.to_thread(work)


def _without(found: list[msgspec.Raw], gone: frozenset[str]) -> list[msgspec.Raw]:
    return [item for item in found if items.id_of(item) not in gone]


def _has_fields(body: bytes) -> bool:
    """Return whether a body has, at its top, one of the fields that only a gateway understands."""
    if not any(b'"%b"' % name.encode() in body for name in _FIELDS):
        return False
    try:
        return not _ANSWER.decode(body).keys().isdisjoint(_FIELDS)
    except (msgspec.DecodeError, RecursionError):
        return False  # for the node to refuse


def _not_found(previous: str, param: str) -> ApiError:
    if param == "conversation":
        return ConversationNotFoundError(
            "A part of the conversation is not stored any more: begin a new one.", param=param
        )
    return PreviousResponseNotFoundError(f"Previous response with id '{previous}' not found.", param=param)


def _full(param: str) -> ConversationFullError:
    return ConversationFullError(
        f"The conversation has {MAX_CHAIN} responses, which is the most: begin a new one with what still matters.",
        param=param,
    )


def _not_stored(response: bytes) -> bytes:
    """Return a response that says that it is not kept."""
    fields = _ANSWER.decode(response)
    if bytes(fields.get("store", b"false")) == b"false":
        return response
    fields["store"] = msgspec.Raw(b"false")
    return msgspec.json.encode(fields)


def _wants_store(body: bytes) -> bool:
    """Return whether a body says by itself that its answer is to be kept."""
    if b'"store"' not in body:
        return False
    try:
        return bytes(_ANSWER.decode(body).get("store", b"")) == b"true"
    except msgspec.DecodeError:
        return False  # for the node to refuse


def _refusal(error: StoreError) -> StoreUnavailableError | StoreFullError:
    if isinstance(error, interface.StoreFullError):
        log.error("%s", error)
        return StoreFullError("The store of responses has no room for this; send 'store': false, or delete others.")
    return _unavailable(error)


def _unavailable(error: StoreError) -> StoreUnavailableError:
    log.error("%s", error)
    return StoreUnavailableError("The store of responses does not answer.", retry_after_s=1)
