"""The gateway's HTTP surface; above all the story of one request: read, peek, route, ask, stream back.

Bodies go to the node byte for byte, but for the model's name where the client used an alias; answers come back byte
for byte, in whole frames. What goes wrong before the first byte keeps its HTTP status, later it ends the stream in the
request's own dialect. Routing, loading and retries are :mod:`cortex.fleet.dispatch`'s.
"""

import asyncio
import math
import random
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
import orjson

from cortex import __version__, tracing
from cortex._fast.peek import PeekError, PeekTypeError, peek, splice
from cortex._fast.responses_stream import ResponsesStream
from cortex._fast.sse import FrameDecoder, FrameTooLarge
from cortex._fast.tap import StreamTap
from cortex.access.gate import Gate, Permit, principal_of, prompt_tokens
from cortex.access.keys import check_model
from cortex.background import Background
from cortex.build_identity import COMMIT
from cortex.config import Config
from cortex.dialects import openai_responses
from cortex.dialects.passthrough import NO_PART, RESPONSES, TAIL_CHUNKS, Dialect, envelope_for, read_answer, read_usage
from cortex.dialects.translate import TranslatedAnswer, Translation, to_chat
from cortex.errors import ReplyError
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.dispatch import Answer, Dispatcher, Question
from cortex.fleet.offers import OfferList, find, offers
from cortex.fleet.state import Fleet
from cortex.http_io import ClientDisconnectedError, Exchange, Header, SocketExchange, stream, until_disconnect
from cortex.metrics import Metrics
from cortex.record import CLIENT_CLOSED_REQUEST, Record
from cortex.store.conversation import Conversations, Turn
from cortex.upstream import Header as UpstreamHeader
from cortex.wire.errors import (
    ApiError,
    InvalidJsonError,
    InvalidTypeError,
    MissingParameterError,
    ModelNotFoundError,
    UpstreamError,
)
from cortex.wire.events import Finished, FinishReason, Started

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Of an answer that is not streamed; it is held whole, so that a cut one is an error and not half a body."""

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class Endpoints:
    """What answers each path. One for the life of a process."""

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        fleet: Fleet,
        dispatcher: Dispatcher,
        metrics: Metrics,
        conversations: Conversations,
        background: Background,
        gate: Gate,
    ) -> None:
        self.reconfigure(config, catalogue)
        self._gate = gate
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._conversations = conversations
        self._background = background

    def reconfigure(self, config: Config, catalogue: Catalogue) -> None:
        """Go by these from now on."""
        self._max_body_bytes = config.gateway.max_body_bytes
        self._catalogue = catalogue

    def infer(self, dialect: Dialect) -> Callable[[Exchange], Awaitable[None]]:
        """Return the endpoint that passes inference of ``dialect`` on."""

        async def endpoint(exchange: Exchange) -> None:
            record = Record(exchange.request_id, dialect.name)
            record.trace = tracing.begin(
                dialect.name, exchange.header(tracing.TRACEPARENT), exchange.header(tracing.TRACESTATE)
            )
            try:
                await self._infer(exchange, dialect, record)
            except ClientDisconnectedError:
                record.status, record.finish = CLIENT_CLOSED_REQUEST, "disconnected"
                raise
            except ApiError as error:
                record.status, record.finish = error.status, error.code
                raise
            finally:
                record.finish_with(self._metrics)

        return endpoint

    async def _infer(self, exchange: Exchange, dialect: Dialect, record: Record) -> None:
        principal = principal_of(exchange.caller)
        record.key = principal.name
        body = await exchange.read_body(self._max_body_bytes)
        try:
            found = peek(body)
        except PeekTypeError as error:
            raise InvalidTypeError(f"Invalid type: {error.reason}.", param=error.field) from None
        except PeekError as error:
            raise InvalidJsonError(f"The body cannot be read: {error}.") from None
        if not found.model:
            raise MissingParameterError("You must provide a model parameter.", param="model")
        model = await self._model(found.model)
        check_model(principal, model)
        record.model = model
        record.is_stream = found.stream and dialect.streams
        if model != found.model:
            body = splice(body, found, model)
        headers = self._headers(exchange, record)
        turn = None
        generates = True
        if dialect is RESPONSES:
            said = None
            if isinstance(exchange, SocketExchange):
                said, generates = exchange.said, exchange.generates
            turn = await self._conversations.of(principal.name).begin(body, found, said)
            body = turn.body
            headers += turn.headers
        if not generates and turn is not None:
            await self._only_read(exchange, record, turn)
            return
        if principal.name:
            headers.append((b"x-cortex-principal", principal.name.encode()))
        if principal.priority:
            headers.append((b"x-cortex-priority", b"%d" % principal.priority))
        in_background = turn is not None and turn.part.background
        chat = to_chat(dialect, body, turn.part if turn is not None else NO_PART)
        asked = Question(
            model,
            dialect.name,
            dialect.path.encode(),
            headers,
            body,
            record.is_stream or in_background,
            found.prompt_cache_key,
            as_chat=chat.body if chat is not None else None,
            priority=principal.priority,
        )
        question = _Asked(asked, chat, turn)
        permit = await self._gate.admit(principal, body)
        try:
            if turn is not None and in_background:
                await self._begin(exchange, dialect, record, question, turn, permit)
            elif record.is_stream:
                await self._stream(exchange, dialect, record, question)
            else:
                await self._answer(exchange, record, question)
        finally:
            await permit.settle(record.tokens_used(prompt_tokens(body)))

    async def _model(self, name: str) -> str:
        """Return the id of the model that a client means: the one of that name, else what an alias makes of it.

        Raises:
            ModelNotFoundError: nobody offers it.
            NoNodeError: nobody that has been heard of offers it.
        """
        model = self._catalogue.resolve(name)
        if not self._dispatcher.knows(model):
            await self._dispatcher.first_look(lambda: self._dispatcher.knows(model))
        if not self._dispatcher.knows(model):
            model = self._catalogue.match(name) or model
        if not self._dispatcher.knows(model):
            raise self._dispatcher.unknown(name)
        return model

    async def _answer(self, exchange: Exchange, record: Record, asked: "_Asked") -> None:
        async def ask() -> tuple[bytes, bytes]:
            answer = await self._ask(record, asked.question)
            try:
                body = await answer.response.read_all(MAX_ANSWER_BYTES)
                if answer.is_chat:
                    return asked.translated().whole(body), b"application/json"
                return body, answer.response.header(b"content-type") or b"application/json"
            finally:
                answer.close()

        body, content_type = await until_disconnect(exchange, ask())
        record.usage, record.finish = read_answer(body)
        record.status = 200
        if asked.turn is not None:
            await self._conversations.of(record.key).keep(asked.turn, body)
        await exchange.reply(200, body, content_type=content_type)

    async def _only_read(self, exchange: Exchange, record: Record, turn: Turn) -> None:
        """Answer with an empty response, which later turns continue; no node is asked."""
        frames = _made_here(turn).frames([Started(0), Finished(FinishReason.STOP, 0)])
        await self._conversations.of(record.key).keep_streamed(turn, frames)
        record.status, record.finish = 200, "not_generated"
        await exchange.start_stream()
        await exchange.write(frames)
        await exchange.finish()

    async def _stream(self, exchange: Exchange, dialect: Dialect, record: Record, asked: "_Asked") -> None:
        relay = _Relay()

        def end_in_failure(error: ApiError) -> bytes:
            record.status, record.finish = error.status, error.code
            return dialect.failure(error.info(), relay.first, b"".join(relay.tail))

        def heartbeat() -> bytes:
            progress = self._dispatcher.load_progress(asked.question.model)
            return dialect.heartbeat if progress is None else dialect.loading(asked.question.model, progress)

        record.status = 200
        frames = self._frames(relay, record, asked)
        try:
            await stream(exchange, frames, heartbeat=heartbeat, error_frame=end_in_failure)
        finally:
            relay.note_end(dialect, record)

    async def _frames(self, relay: "_Relay", record: Record, asked: "_Asked") -> AsyncGenerator[bytes, None]:
        """Yield what may go on of a node's stream.

        Raises:
            ApiError: no node could be asked, or the stream broke, fell silent or ended before its terminator.
        """
        answer = await self._ask(record, asked.question)
        try:
            content_type = answer.response.header(b"content-type") or b""
            if not content_type.startswith(b"text/event-stream"):
                raise UpstreamError(f"{answer.node} answered a streamed request with {content_type.decode('latin-1')}.")
            read = answer.response.read
            translated = asked.translated() if answer.is_chat else None
            more = True
            while more:
                data = await read()
                more = bool(data)
                if translated is not None:
                    data = translated.frames(data) if more else translated.end()
                frames = relay.take(data)
                if record.first_token_at is None and relay.has_token:
                    record.note_first_token()
                if frames:
                    record.num_chunks += 1
                    if asked.turn is not None and relay.is_complete:
                        await self._conversations.of(record.key).keep_streamed(asked.turn, frames)
                    yield frames
            if not relay.is_complete:
                raise UpstreamError(f"{answer.node} ended its answer before the stream's terminator.")
        except FrameTooLarge as error:
            answer.note_broken()
            raise UpstreamError(f"{answer.node} sent a frame of more than {error.max_frame_bytes} bytes.") from None
        except UpstreamError:
            # Without its terminator the answer is broken; with it, only the connection's own end is missing.
            if not relay.is_complete:
                answer.note_broken()
                raise
        finally:
            answer.close()

    async def _ask(self, record: Record, question: Question) -> Answer:
        def note(node: str) -> None:
            record.node = node

        return await self._dispatcher.ask(question, note)

    def _headers(self, exchange: Exchange, record: Record) -> list[UpstreamHeader]:
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", exchange.request_id.encode()),
            (b"x-cortex-report-usage", b"1"),
        ]
        if record.trace is not None:
            headers += record.trace.headers
        return headers

    async def _begin(
        self, exchange: Exchange, dialect: Dialect, record: Record, asked: "_Asked", turn: Turn, permit: Permit
    ) -> None:
        """Begin a response that is made in the background; what it costs is written down by a record of its own."""
        created = FrameDecoder().feed(_made_here(turn).frames([Started(0)]))[0]
        queued = orjson.dumps(orjson.loads(created.data)["response"] | {"status": "queued"})
        making = Record(record.request_id, dialect.name)
        making.model, making.key, making.is_stream = record.model, record.key, True
        if record.trace is not None:  # its span is about the answer, which is still to be made
            making.trace, record.trace = record.trace, record.trace.without_span()
        held = permit.move()
        frames = self._made(dialect, making, _Asked(asked.question, asked.chat, None), held)
        try:
            run = await self._background.start(self._conversations.of(record.key), turn, queued, frames)
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
            heartbeat=dialect.heartbeat,
            error_frame=lambda error: dialect.failure(error.info(), b"", b""),
        )

    async def _made(
        self, dialect: Dialect, record: Record, asked: "_Asked", permit: Permit
    ) -> AsyncGenerator[bytes, None]:
        """Yield the frames of a response that nobody may be waiting for, and write down how it went."""
        relay = _Relay()
        record.status = 200
        try:
            async with aclosing(self._frames(relay, record, asked)) as frames:
                async for some in frames:
                    yield some
        except ApiError as error:
            record.status, record.finish = error.status, error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.status, record.finish = CLIENT_CLOSED_REQUEST, "cancelled"
            raise
        finally:
            relay.note_end(dialect, record)
            record.finish_with(self._metrics)
            await permit.settle(record.tokens_used(prompt_tokens(asked.question.body)))

    async def models(self, exchange: Exchange) -> None:
        """``GET /v1/models``."""
        principal = principal_of(exchange.caller)
        await self._dispatcher.first_look()
        everything = offers(self._catalogue, self._fleet.state)
        listed = OfferList(tuple(o for o in everything if principal.may_use(o.alias_of or o.id)))
        await exchange.reply(200, msgspec.json.encode(listed.as_anthropic() if _is_anthropic(exchange) else listed))

    async def model(self, exchange: Exchange) -> None:
        """``GET /v1/models/{id}``; an id may contain slashes."""
        principal = principal_of(exchange.caller)
        name = exchange.path.removeprefix("/v1/models/")
        await self._dispatcher.first_look()
        offer = find(self._catalogue, self._fleet.state, name)
        if offer is None or not principal.may_use(offer.alias_of or offer.id):
            raise ModelNotFoundError(f"The model {name!r} does not exist.", param="model")
        await exchange.reply(200, msgspec.json.encode(offer.as_anthropic() if _is_anthropic(exchange) else offer))

    async def health(self, exchange: Exchange) -> None:
        """``GET /health``: 200 while this process answers; whether it has anybody to ask is in the body."""
        nodes = self._fleet.state.nodes.values()
        num_up = sum(node.up for node in nodes)
        state = "ready" if num_up else "no_node"
        body = {"state": state, "nodes_up": num_up, "nodes": len(nodes), "in_flight": self.num_in_flight}
        await exchange.reply(200, msgspec.json.encode(body))

    async def version(self, exchange: Exchange) -> None:
        """``GET /version``."""
        await exchange.reply(200, msgspec.json.encode({"name": "cortex", "version": __version__, "commit": COMMIT}))

    @property
    def num_in_flight(self) -> int:
        """Requests of this process that have a node and no end yet."""
        return sum(self._fleet.in_flight.by_node.values())


def _made_here(turn: Turn) -> ResponsesStream:
    """Return what makes a response of a turn without a node. Raises :class:`InvalidRequestError`."""
    call = openai_responses.decode(turn.body)
    id = turn.part.id or f"resp_{secrets.token_hex(24)}"
    return ResponsesStream(id, call.request.model, int(time.time()), call.echoed(turn.part))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, what it is in chat, and the turn of a conversation that it is."""

    question: Question
    chat: Translation | None
    turn: Turn | None

    def translated(self) -> TranslatedAnswer:
        """Return what reads a chat that answers it."""
        assert self.chat is not None  # only then is a node asked in chat
        return self.chat.begin()


class _Relay:
    """One stream passing through, and what is to be remembered of it."""

    def __init__(self) -> None:
        self.first = b""
        self.tail: deque[bytes] = deque(maxlen=TAIL_CHUNKS)
        self._tap = StreamTap()

    def take(self, data: bytes) -> bytes:
        """Return the whole frames that ``data`` completes."""
        frames = self._tap.feed(data)
        if frames:
            if not self.first:
                self.first = frames
            self.tail.append(frames)
        return frames

    @property
    def has_token(self) -> bool:
        """Whether a token has passed."""
        return self._tap.first_token

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its dialect demands, well or with an error of its own."""
        return self._tap.terminated or self._tap.failed

    def note_end(self, dialect: Dialect, record: Record) -> None:
        """Write down what the stream said of itself; an error that ended it has been written already."""
        if self._tap.usage is not None:
            record.usage = read_usage(self._tap.usage)
        if record.finish or not self.is_complete:
            return
        finishes = dialect.finish.findall(b"".join(self.tail))
        record.finish = finishes[-1].decode().rpartition(".")[2] if finishes else ""
        if self._tap.failed:
            record.status, record.finish = UpstreamError.status, "failed"


def request_id_of(given: bytes | None) -> str:
    """Return the caller's ``x-request-id`` if it is fit to be logged and sent on, else a new one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given.decode()
    return f"req_{random.getrandbits(96):024x}"


def _is_anthropic(exchange: Exchange) -> bool:
    """Return whether a client of either family that asks at a path of both is Anthropic's."""
    return exchange.header(b"anthropic-version") is not None


async def reply_error(exchange: Exchange, error: ApiError, headers: tuple[Header, ...] = ()) -> None:
    """Answer with an error, in the envelope of the path's dialect; a node's own body goes on as it is."""
    if isinstance(error, ReplyError) and error.content_type.startswith(b"application/json"):
        if error.retry_after is not None:
            headers = (*headers, (b"retry-after", error.retry_after))
        await exchange.reply(error.status, error.body, content_type=error.content_type, headers=headers)
        return
    if error.retry_after_s is not None:
        headers = (*headers, (b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
    envelope, info = envelope_for(exchange.path), error.info()
    await exchange.reply(envelope.status(info), envelope.body(info, exchange.request_id), headers=headers)
