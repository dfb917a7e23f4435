"""The daemon's HTTP surface: what a request asks for, and the shape of the answer.

Chat Completions, text completions, Responses and Messages are projections of the same ``InferenceEvent``s. State lives
in the service; what a model does, in its harness. Every error leaves in the envelope of its path's dialect.
"""

import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol, TypeVar

import msgspec

from cortex import logs, tracing
from cortex._fast.chat_stream import ChatStream
from cortex._fast.messages_stream import MessagesStream
from cortex._fast.responses_stream import ResponsesStream
from cortex.build_identity import COMMIT
from cortex.dialects import (
    anthropic_messages,
    openai_chat,
    openai_compaction,
    openai_completion_reply,
    openai_completions,
    openai_embeddings,
    openai_fields,
    openai_responses,
    openapi,
)
from cortex.dialects.openai_chat_reply import ChatReply
from cortex.dialects.parameters import add_header
from cortex.dialects.passthrough import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    COUNT_TOKENS,
    EMBEDDINGS,
    INPUT_TOKENS,
    MESSAGES,
    RESPONSES,
    Dialect,
    ResponseContext,
    envelope_for,
)
from cortex.dialects.unseen_parts import readable
from cortex.event_stream import stream
from cortex.http_io import (
    AsgiExchange,
    ClientDisconnectedError,
    Exchange,
    Header,
    Receive,
    Scope,
    Send,
    until_disconnect,
)
from cortex.wire.errors import (
    ApiError,
    ErrorInfo,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    RemoteError,
    UnauthorizedError,
)
from cortex.wire.events import Failed, Finished, FinishReason, InferenceEvent, Started
from cortex.wire.headers import (
    CLIENT_CLOSED_REQUEST,
    IGNORED,
    MODEL_NAME,
    OMITTED_PARTS,
    PRINCIPAL,
    PRIORITY,
    REPORT_USAGE,
    REQUEST_ID,
    RESPONSE_CONTEXT,
    request_id_of,
    requested_model_name,
    retry_after,
)
from cortex.wire.node import (
    Capability,
    DrainRequest,
    Endpoint,
    ForgetRequest,
    LoadRequest,
    ModelList,
    PinRequest,
    UnloadRequest,
)
from cortex.wire.request import EmbeddingRequest, InferenceRequest
from neuron import __version__, api_description, metrics
from neuron.batch import infer_all
from neuron.harness import Model
from neuron.metrics import RequestRecord
from neuron.service import Service

_log = logging.getLogger("neuron.api")

DIALECTS = (CHAT.name, COMPLETIONS.name, EMBEDDINGS.name, RESPONSES.name, MESSAGES.name)
HOLD_SHARE = 2 / 3
"""Share of the time for which headers are held: a gateway has not sent its own by then, and can forward a node's."""

_PRIORITY = re.compile(rb"[+-]?[0-9]{1,9}")
_Request = TypeVar("_Request", InferenceRequest, EmbeddingRequest)
_ADMIN_BODY_BYTES = 1 << 20
_LOAD_DECODER = msgspec.json.Decoder(LoadRequest)
_UNLOAD_DECODER = msgspec.json.Decoder(UnloadRequest)
_FORGET_DECODER = msgspec.json.Decoder(ForgetRequest)
_PIN_DECODER = msgspec.json.Decoder(PinRequest)
_DRAIN_DECODER = msgspec.json.Decoder(DrainRequest)

Handler = Callable[[Exchange], Awaitable[None]]


class Projector(Protocol):
    """Turns events into the SSE events of a dialect."""

    def sse_events(self, events: Sequence[InferenceEvent], /) -> bytes:
        """Return the SSE events of a batch of events."""


class Api:
    """The ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._routes: dict[str, dict[str, Handler]] = {
            "/discovery": {"GET": self._discovery},
            "/health": {"GET": self._health},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics},
            "/models": {"GET": self._models},
            "/models/load": {"POST": self._load},
            "/models/unload": {"POST": self._unload},
            "/models/forget": {"POST": self._forget},
            "/models/pin": {"POST": self._pin},
            "/drain": {"POST": self._drain},
            "/v1/models": {"GET": self._openai_models},
            openapi.PATH: {"GET": self._describe},
            CHAT.path: {"POST": self._infer(CHAT, self._chat)},
            COMPLETIONS.path: {"POST": self._infer(COMPLETIONS, self._completions)},
            EMBEDDINGS.path: {"POST": self._infer(EMBEDDINGS, self._embeddings)},
            RESPONSES.path: {"POST": self._infer(RESPONSES, self._responses)},
            COMPACT.path: {"POST": self._infer(COMPACT, self._compact)},
            INPUT_TOKENS.path: {"POST": self._infer(INPUT_TOKENS, self._input_tokens)},
            MESSAGES.path: {"POST": self._infer(MESSAGES, self._messages)},
            COUNT_TOKENS.path: {"POST": self._infer(COUNT_TOKENS, self._count_tokens)},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        exchange = AsgiExchange(scope, receive, send, request_id="")
        exchange.body_timeout_s = self._service.body_timeout_s
        exchange.request_id = request_id_of(exchange.header(REQUEST_ID))
        try:
            await self._let_in(exchange)(exchange)
        except ClientDisconnectedError:
            return
        except ApiError as error:
            await _reply_error(exchange, error.info())
        except Exception:
            # The last resort of a server: the bug is logged, the client gets a typed answer, the daemon lives on.
            _log.exception("unexpected error id=%s path=%s", exchange.request_id, exchange.path)
            if exchange.status:
                raise
            await _reply_error(exchange, ErrorInfo(500, "internal_error", "An internal error occurred."))

    def _let_in(self, exchange: Exchange) -> Handler:
        """Return what answers. What is rejected here is written down here: nobody else sees it.

        Raises:
            ApiError: who asks may not, or there is no such path or method.
        """
        try:
            handler = self._handler(exchange)
            self._check_secret(exchange)
        except ApiError as error:
            metrics.REJECTED.labels(error.status).inc()
            logs.rejected(_log, exchange.request_id, exchange.method, exchange.path, error.status, error.code)
            raise
        return handler

    def _handler(self, exchange: Exchange) -> Handler:
        methods = self._routes.get(exchange.path)
        if methods is None and exchange.path.startswith("/models/") and exchange.path.endswith("/endpoint"):
            methods = {"GET": self._endpoint}
        if methods is None:
            raise NotFoundError(f"Unknown path: {exchange.method} {exchange.path}.")
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise MethodNotAllowedError(f"{exchange.path} does not take {exchange.method}; it takes {allowed}.")
        return handler

    def _check_secret(self, exchange: Exchange) -> None:
        """Let only those in who have the secret, where there is one, and else no page of a browser.

        Whether the daemon lives, anybody may ask.
        """
        self._service.guard.check_media_type(exchange.method, exchange.header)
        secret = self._service.secret
        if exchange.path == "/health":
            return
        if not secret:
            self._service.guard.check_site(exchange.header, setting="daemon")
            return
        given = exchange.header(b"authorization") or b""
        if not hmac.compare_digest(given, b"Bearer " + secret):
            raise UnauthorizedError("This neuron answers only those who send its secret.")

    # ------------------------------------------------------------------ the node

    async def _discovery(self, exchange: Exchange) -> None:
        await _reply(exchange, await self._service.discovery(DIALECTS))

    async def _health(self, exchange: Exchange) -> None:
        await _reply(exchange, self._service.health())

    async def _version(self, exchange: Exchange) -> None:
        await _reply(exchange, {"name": "neuron", "version": __version__, "commit": COMMIT})

    async def _describe(self, exchange: Exchange) -> None:
        await exchange.reply(200, api_description.description())

    async def _metrics(self, exchange: Exchange) -> None:
        devices = (await self._service.discovery(DIALECTS)).devices
        text = metrics.render(self._service.models.statuses(), self._service.health().workers, devices)
        await exchange.reply(200, text, content_type=b"text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, exchange: Exchange) -> None:
        models = self._service.models
        await _reply(exchange, ModelList(models.statuses(), models.generation))

    async def _load(self, exchange: Exchange) -> None:
        asked = openai_fields.decode(await exchange.read_body(_ADMIN_BODY_BYTES), _LOAD_DECODER)
        await _reply(exchange, await until_disconnect(exchange, self._service.load(asked)))

    async def _unload(self, exchange: Exchange) -> None:
        asked = openai_fields.decode(await exchange.read_body(_ADMIN_BODY_BYTES), _UNLOAD_DECODER)
        await _reply(exchange, await self._service.unload(asked))

    async def _forget(self, exchange: Exchange) -> None:
        asked = openai_fields.decode(await exchange.read_body(_ADMIN_BODY_BYTES), _FORGET_DECODER)
        status = self._service.models.find(asked.id).status()
        self._service.models.forget(asked.id)
        await _reply(exchange, status)

    async def _pin(self, exchange: Exchange) -> None:
        asked = openai_fields.decode(await exchange.read_body(_ADMIN_BODY_BYTES), _PIN_DECODER)
        status = self._service.models.pin(asked.id, asked.pinned, asked.priority, asked.idle_ttl_s)
        await _reply(exchange, status)

    async def _drain(self, exchange: Exchange) -> None:
        asked = openai_fields.decode(await exchange.read_body(_ADMIN_BODY_BYTES), _DRAIN_DECODER)
        await _reply(exchange, self._service.drain(asked))

    async def _endpoint(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix("/models/").removesuffix("/endpoint")
        with self._service.models.use(name):
            host = exchange.header(b"host") or self._service.listen.encode()
            await _reply(exchange, Endpoint(name, f"http://{host.decode('latin-1')}/v1", DIALECTS))

    async def _openai_models(self, exchange: Exchange) -> None:
        data = [
            {"id": status.id, "object": "model", "created": int(status.loaded_at), "owned_by": "neuron"}
            for status in self._service.models.statuses()
        ]
        await _reply(exchange, {"object": "list", "data": data})

    # ------------------------------------------------------------------ inference

    def _infer(self, dialect: Dialect, answer: Callable[[Exchange, RequestRecord], Awaitable[None]]) -> Handler:
        """Return the handler that writes down each request of a dialect, also one that is refused at once."""

        async def handler(exchange: Exchange) -> None:
            trace = tracing.begin(dialect.name, exchange.header)
            record = RequestRecord(exchange.request_id, dialect.name, trace)
            with _recorded(exchange, record):
                self._service.admit()
                await answer(exchange, record)

        return handler

    async def _chat(self, exchange: Exchange, record: RequestRecord) -> None:
        call = openai_chat.decode(await exchange.read_body(self._service.max_body_bytes))
        _report(exchange, call)
        request, created = call.request, int(time.time())
        name = _name(exchange, request)
        reply_id = f"chatcmpl-{secrets.token_hex(12)}"
        record.is_stream = call.stream
        if call.stream:
            sse_events = ChatStream(
                reply_id,
                name,
                created,
                num_choices=request.num_choices,
                include_usage=call.include_usage,
                report_usage=exchange.header(REPORT_USAGE) is not None,
                custom_tools=call.custom,
            )
            await self._stream(exchange, CHAT, (request,), sse_events, record)
            return
        reply = ChatReply(reply_id, name, created, request.num_choices, call.custom)
        await self._complete(exchange, (request,), reply.add, reply.body, record)

    async def _completions(self, exchange: Exchange, record: RequestRecord) -> None:
        call = openai_completions.decode(await exchange.read_body(self._service.max_body_bytes))
        _report(exchange, call)
        requests = call.requests
        record.is_stream = call.stream
        sse_events = openai_completion_reply.Completion(
            f"cmpl-{secrets.token_hex(12)}",
            _name(exchange, requests[0]),
            int(time.time()),
            num_choices=call.num_choices,
            include_usage=call.include_usage,
            report_usage=exchange.header(REPORT_USAGE) is not None,
            scores=call.scores,
        )
        if call.stream:
            await self._stream(exchange, COMPLETIONS, requests, sse_events, record)
        else:
            await self._complete(exchange, requests, sse_events.add, sse_events.body, record)

    async def _embeddings(self, exchange: Exchange, record: RequestRecord) -> None:
        call = openai_embeddings.decode(await exchange.read_body(self._service.max_body_bytes))
        _report(exchange, call)
        request = _on_behalf(exchange, call.request)
        with self._service.models.use(request.model) as model:
            record.model = request.model
            found = await until_disconnect(exchange, model.embed(request))
            record.observe([Started(found.prompt_tokens, 0), Finished(FinishReason.STOP, 0)])
            name = _name(exchange, request)
            body = openai_embeddings.reply(name, found.vectors, found.prompt_tokens, is_base64=call.is_base64)
            await exchange.reply(200, body)

    async def _responses(self, exchange: Exchange, record: RequestRecord) -> None:
        call = openai_responses.decode(await exchange.read_body(self._service.max_body_bytes))
        _report(exchange, call)
        request = call.request
        record.is_stream = call.stream
        context = ResponseContext.of(exchange.header(RESPONSE_CONTEXT))
        sse_events = ResponsesStream(
            context.id or f"resp_{secrets.token_hex(24)}",
            _name(exchange, request),
            int(time.time()),
            echo=call.echoed(context),
            report_usage=exchange.header(REPORT_USAGE) is not None,
            custom_tools=call.tools.custom,
            namespaces=call.tools.namespaces,
            summarises=call.summarises,
            seals=call.seals,
        )
        if call.stream:
            await self._stream(exchange, RESPONSES, (request,), sse_events, record)
        else:
            await self._complete(exchange, (request,), sse_events.sse_events, sse_events.response, record)

    async def _compact(self, exchange: Exchange, record: RequestRecord) -> None:
        body = await exchange.read_body(self._service.max_body_bytes)
        openai_responses.PARAMETERS.read(body)  # which counts what is in it
        compaction = openai_compaction.Compaction(body)
        call = openai_responses.decode(compaction.question())
        _report(exchange, call)
        id = f"resp_{secrets.token_hex(24)}"
        sse_events = ResponsesStream(id, call.request.model, int(time.time()), echo=b"{}")
        await self._complete(
            exchange, (call.request,), sse_events.sse_events, lambda: compaction.answer(sse_events.response()), record
        )

    async def _input_tokens(self, exchange: Exchange, record: RequestRecord) -> None:
        body = await exchange.read_body(self._service.max_body_bytes)
        openai_responses.PARAMETERS.read(body)
        body = openai_compaction.with_input(body)
        call = openai_responses.decode(body)
        _report(exchange, call)
        await self._count(exchange, call.request, openai_responses.COUNTED, record)

    async def _messages(self, exchange: Exchange, record: RequestRecord) -> None:
        call = anthropic_messages.decode(await exchange.read_body(self._service.max_body_bytes))
        _report(exchange, call)
        request = call.request
        record.is_stream = call.stream
        sse_events = MessagesStream(f"msg_{secrets.token_hex(12)}", _name(exchange, request))
        if call.stream:
            await self._stream(exchange, MESSAGES, (request,), sse_events, record)
        else:
            await self._complete(exchange, (request,), sse_events.sse_events, sse_events.message, record)

    async def _count_tokens(self, exchange: Exchange, record: RequestRecord) -> None:
        call = anthropic_messages.decode(await exchange.read_body(self._service.max_body_bytes))
        _report(exchange, call)
        await self._count(exchange, call.request, {}, record)

    async def _count(
        self, exchange: Exchange, request: InferenceRequest, extra: dict[str, str], record: RequestRecord
    ) -> None:
        """Answer with how many tokens a prompt has, and with what the dialect says beside it."""
        with self._service.models.use(request.model) as model:
            record.model = request.model
            request = self._readable(exchange, request, model)
            num_tokens = await until_disconnect(exchange, model.count_tokens(request))
            record.observe([Started(num_tokens)])
            await _reply(exchange, {**extra, "input_tokens": num_tokens})

    async def _stream(
        self,
        exchange: Exchange,
        dialect: Dialect,
        requests: Sequence[InferenceRequest],
        projector: Projector,
        record: RequestRecord,
    ) -> None:
        requests = [_on_behalf(exchange, request) for request in requests]

        async def sse_events() -> AsyncGenerator[bytes, None]:
            async for events in self._events(exchange, requests, record):
                if made := projector.sse_events(events):
                    yield made

        await stream(
            exchange,
            sse_events(),
            heartbeat=dialect.heartbeat,
            error_event=lambda error: projector.sse_events([Failed(error.info())]),
            hold_share=HOLD_SHARE,
        )

    async def _complete(
        self,
        exchange: Exchange,
        requests: Sequence[InferenceRequest],
        add: Callable[[Sequence[InferenceEvent]], object],
        body: Callable[[], bytes],
        record: RequestRecord,
    ) -> None:
        requests = [_on_behalf(exchange, request) for request in requests]

        async def gather() -> None:
            async with aclosing(self._events(exchange, requests, record)) as batches:
                async for events in batches:
                    for event in events:
                        if isinstance(event, Failed):
                            raise RemoteError(event.error)
                    add(events)

        await until_disconnect(exchange, gather())
        await exchange.reply(200, body())

    def _readable(self, exchange: Exchange, request: InferenceRequest, model: Model) -> InferenceRequest:
        """Return a request without what its model cannot take, and have the answer say how much that was.

        Raises:
            UnsupportedParameterError: the user has just said such a thing.
        """
        messages, num_omitted = readable(
            request.messages,
            images=Capability.VISION in model.capabilities,
            model=request.model,
            seeing=[one.id for one in self._service.models.statuses() if Capability.VISION in one.capabilities],
            param="input" if exchange.path.startswith(RESPONSES.path) else "messages",
        )
        if not num_omitted:
            return request
        num_omitted += int(exchange.extra_headers.get(OMITTED_PARTS, b"0"))
        add_header(exchange.extra_headers, OMITTED_PARTS, b"%d" % num_omitted)
        return msgspec.structs.replace(request, messages=messages)

    async def _events(
        self, exchange: Exchange, requests: Sequence[InferenceRequest], record: RequestRecord
    ) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        """Run the requests of a call on their model, which stays in use until the generator is closed."""
        with self._service.models.use(requests[0].model) as model:
            record.model = requests[0].model
            requests = [self._readable(exchange, request, model) for request in requests]
            _report_ignored(exchange, await model.left_out(requests[0]))
            run = model.infer(requests[0]) if len(requests) == 1 else infer_all(model, requests)
            async with aclosing(run) as batches:
                async for events in batches:
                    record.observe(events)
                    yield events


class _Call(Protocol):
    """A decoded body of any dialect."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """The members that nobody knows."""


def _report(exchange: Exchange, call: _Call) -> None:
    """Have the answer say which members of the body nobody knows, and how many parts no model here can take."""
    if num_omitted := getattr(call, "num_omitted", 0):
        add_header(exchange.extra_headers, OMITTED_PARTS, b"%d" % num_omitted)
    _report_ignored(exchange, call.ignored)


def _report_ignored(exchange: Exchange, names: Sequence[str]) -> None:
    if names:
        add_header(exchange.extra_headers, IGNORED, ",".join(names).encode())
        _log.info("id=%s ignored=%s", exchange.request_id, exchange.extra_headers[IGNORED].decode())


def _name(exchange: Exchange, request: InferenceRequest | EmbeddingRequest) -> str:
    """Return what an answer calls the model: as the client did, if a gateway says how."""
    return requested_model_name(exchange.header(MODEL_NAME), request.model)


def _on_behalf(exchange: Exchange, request: _Request) -> _Request:
    """Return ``request`` with its principal and priority, if the gateway named them.

    Raises:
        InvalidRequestError: the priority is not an integer.
    """
    principal, priority = exchange.header(PRINCIPAL), exchange.header(PRIORITY)
    if not principal and not priority:
        return request
    if priority and _PRIORITY.fullmatch(priority) is None:
        raise InvalidRequestError(f"The header {PRIORITY.decode()} is not an integer.")
    return msgspec.structs.replace(
        request, principal=(principal or b"").decode("latin-1"), priority=int(priority or b"0")
    )


@contextmanager
def _recorded(exchange: Exchange, record: RequestRecord) -> Iterator[None]:
    """Close the record of a request however it ends."""
    status = 500
    try:
        yield
        status = exchange.status
    except ClientDisconnectedError:
        status = CLIENT_CLOSED_REQUEST
        raise
    except ApiError as error:
        status = error.status
        record.finish = record.finish or error.code
        raise
    finally:
        record.close(status)


async def _reply(exchange: Exchange, value: object) -> None:
    await exchange.reply(200, msgspec.json.encode(value))


async def _reply_error(exchange: Exchange, error: ErrorInfo) -> None:
    headers: list[Header] = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", retry_after(error.retry_after_s)))
    envelope = envelope_for(exchange.path)
    await exchange.reply(envelope.status(error), envelope.body(error, exchange.request_id), headers=headers)
