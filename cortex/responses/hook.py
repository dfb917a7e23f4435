"""Steps of a request for a response before a node gets it and after the node has answered.

Before: the request gets the items of the conversation that it continues. After: the response is kept. A request that
no node answers (``generate: false``) ends here, and one in the background is served by its run. Routes, retries and
streams are the caller's.
"""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import orjson

from cortex._fast.peek import Peek
from cortex._fast.record import Record
from cortex._fast.responses_stream import ResponsesStream
from cortex._fast.sse import SseDecoder
from cortex.access.authenticator import Authenticator, Reservation
from cortex.access.keys import Principal
from cortex.dialects.call import Answering
from cortex.dialects.dialect import Dialect
from cortex.dialects.registry import COMPACT, RESPONSES
from cortex.dialects.responses import compaction
from cortex.dialects.responses import request as responses_request
from cortex.dialects.responses.context import NO_CONTEXT, ResponseContext
from cortex.event_stream import stream
from cortex.http_io import Exchange, Header
from cortex.responses.background import Background
from cortex.responses.stored import PendingResponse, StoredResponses
from cortex.responses.websocket import SocketRequest
from cortex.wire.errors import ApiError
from cortex.wire.events import Finished, FinishReason, Started


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A request for a response, as it was read."""

    exchange: Exchange
    dialect: Dialect
    record: Record
    principal: Principal
    name: str
    """Model, as the client named it."""
    body: bytes
    found: Peek
    """Fields that the first reading of the body found."""


Generate = Callable[[Record, Reservation], AsyncGenerator[bytes, None]]
"""Start of a node's stream without a client; its end is written to the record, and settles the reservation."""


class PreparedResponse:
    """A request for a response before its node has answered: what the node gets, and the steps after it."""

    context: ResponseContext = NO_CONTEXT
    has_after = False
    """Whether :meth:`after` and :meth:`after_stream` do something."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    @property
    def headers(self) -> tuple[Header, ...]:
        """Headers for the node."""
        return self.context.headers()

    async def after(self, answer: bytes) -> bytes:
        """Return the client's answer to a node's. Raises :class:`NotAnAnswerError`, :class:`UpstreamError`."""
        return answer

    async def after_stream(self, sse_events: bytes) -> bytes:
        """Return the last SSE events of a stream for the client. Raises :class:`NotAnAnswerError`."""
        return sse_events

    async def serve_in_background(self, reservation: Reservation, generate: Generate) -> None:
        """Start a response whose ``context`` has ``background``, and answer with it or with its stream."""
        raise NotImplementedError


class _Compaction(PreparedResponse):
    """A request that is a response like any other to its node, and a compaction to its client."""

    has_after = True

    def __init__(self, body: bytes) -> None:
        self._compaction = compaction.Compaction(body)
        super().__init__(self._compaction.question())

    async def after(self, answer: bytes) -> bytes:
        return self._compaction.answer(answer)


class _Response(PreparedResponse):
    """A request whose response may be kept."""

    def __init__(
        self, request: ResponseRequest, owned: StoredResponses, pending: PendingResponse, background: Background
    ) -> None:
        super().__init__(pending.body)
        self.context, self.has_after = pending.context, pending.is_kept
        self._request = request
        self._owned = owned
        self._pending = pending
        self._background = background

    async def after(self, answer: bytes) -> bytes:
        return await self._owned.keep(self._pending, answer)

    async def after_stream(self, sse_events: bytes) -> bytes:
        return await self._owned.keep_streamed(self._pending, sse_events)

    async def answer_without_generation(self) -> None:
        """Answer with an empty response for later requests to continue."""
        exchange, record = self._request.exchange, self._request.record
        local = self._local_stream()
        sse_events = await self.after_stream(local.sse_events([Started(0), Finished(FinishReason.STOP, 0)]))
        record.status, record.finish = 200, "not_generated"
        await exchange.start_stream()
        await exchange.write(sse_events)
        await exchange.finish()

    async def serve_in_background(self, reservation: Reservation, generate: Generate) -> None:
        """Start a background response, which has a record of its own, and answer with it or with its stream."""
        exchange, record = self._request.exchange, self._request.record
        begun = self._local_stream().sse_events([Started(0)])
        created = SseDecoder(len(begun) + 1).feed(begun)[0]
        queued = orjson.dumps(orjson.loads(created.data)["response"] | {"status": "queued"})
        making = Record(record.request_id, record.dialect)
        making.model, making.key, making.is_stream = record.model, record.key, True
        if record.trace is not None:  # its span is about the answer, which is still to be made
            making.trace, record.trace = record.trace, record.trace.without_span()
        held = reservation.move()
        try:
            run = await self._background.start(self._owned, self._pending, queued, generate(making, held))
        except BaseException:
            await held.settle(0)
            raise
        record.status, record.finish = 200, "queued"
        if not record.is_stream:
            await exchange.reply(200, queued)
            return
        await stream(
            exchange,
            run.follow(-1),
            heartbeat=RESPONSES.heartbeat,
            error_event=lambda error: RESPONSES.failure(error.info(), b"", b""),
        )

    def _local_stream(self) -> ResponsesStream:
        """Return an encoder for a response that no node makes. Raises :class:`InvalidRequestError`."""
        return responses_request.decode(self.body).encoder(Answering(self._request.name, context=self.context))


class ResponsesHook:
    """The steps of all requests for responses."""

    def __init__(self, responses: StoredResponses, background: Background, authenticator: Authenticator) -> None:
        self._responses = responses
        self._background = background
        self._authenticator = authenticator

    async def before(self, request: ResponseRequest) -> PreparedResponse | None:
        """Return what a node gets of a request; ``None`` if the request has been answered without a node.

        Raises :class:`ApiError` as :meth:`StoredResponses.begin` does; such a request counts for its key.
        """
        owned = self._responses.of(request.principal.name)
        origin = request.exchange.origin
        try:
            if request.dialect is not RESPONSES:
                body = compaction.with_input(request.body)
                body = (await owned.begin(body, request.found, keeps=False)).body
                return _Compaction(body) if request.dialect is COMPACT else PreparedResponse(body)
            history = origin.history if isinstance(origin, SocketRequest) else None
            pending = await owned.begin(request.body, request.found, history)
        except ApiError:
            await self._authenticator.count(request.principal)  # to look for what is not there costs a request, too
            raise
        prepared = _Response(request, owned, pending, self._background)
        if isinstance(origin, SocketRequest) and not origin.generates:
            await self._authenticator.count(request.principal)
            await prepared.answer_without_generation()
            return None
        return prepared
