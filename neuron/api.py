"""The daemon's ASGI application: authorisation, and the inference paths of all dialects.

Chat Completions, text completions, Responses and Messages are projections of the same ``InferenceEvent``s. State lives
in the service, inference in the harnesses. Every error has the envelope of its path's dialect. The node's own paths are
in :mod:`neuron.node_api`.
"""

import hmac
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol

import msgspec

from cortex import logs, tracing
from cortex._fast.chat_stream import ChatStream
from cortex._fast.messages_stream import MessagesStream
from cortex._fast.responses_stream import ResponsesStream
from cortex.dialects import (
    anthropic_messages,
    openai_chat,
    openai_compaction,
    openai_completion_reply,
    openai_completions,
    openai_embeddings,
    openai_responses,
)
from cortex.dialects.omitted_parts import readable
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
    MethodNotAllowedError,
    NotFoundError,
    RemoteError,
    UnauthorizedError,
)
from cortex.wire.events import Failed, Finished, FinishReason, InferenceEvent, Started
from cortex.wire.headers import (
    CLIENT_CLOSED_REQUEST,
    OMITTED_PARTS,
    REPORT_USAGE,
    REQUEST_ID,
    RESPONSE_CONTEXT,
    request_id_of,
    retry_after,
)
from cortex.wire.node import (
    Capability,
)
from cortex.wire.request import InferenceRequest
from neuron import metrics
from neuron.batch import infer_all
from neuron.call_headers import on_behalf, report_call, report_ignored, requested_name
from neuron.harness import Model
from neuron.metrics import RequestRecord
from neuron.node_api import Handler, NodeApi, reply_json
from neuron.service import Service

_log = logging.getLogger("neuron.api")

HOLD_SHARE = 2 / 3
"""Share of the time for which headers are held: a gateway has not sent its own by then, and can forward a node's."""


class Projector(Protocol):
    """Turns events into the SSE events of a dialect."""

    def sse_events(self, events: Sequence[InferenceEvent], /) -> bytes:
        """Return the SSE events of a batch of events."""


class Api:
    """The ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._node = NodeApi(service)
        self._routes: dict[str, dict[str, Handler]] = {
            **self._node.routes,
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
            # Log the bug, give the client a typed answer, and keep the daemon alive.
            _log.exception("unexpected error id=%s path=%s", exchange.request_id, exchange.path)
            if exchange.status:
                raise
            await _reply_error(exchange, ErrorInfo(500, "internal_error", "An internal error occurred."))

    def _let_in(self, exchange: Exchange) -> Handler:
        """Return the handler of an authorised request; log and count a rejected one.

        Raises:
            ApiError: the request is not authorised, or there is no such path or method.
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
            methods = {"GET": self._node.endpoint}
        if methods is None and exchange.path.startswith("/v1/models/"):
            methods = {"GET": self._node.listed_model}
        if methods is None:
            raise NotFoundError(f"Unknown path: {exchange.method} {exchange.path}.")
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise MethodNotAllowedError(f"{exchange.path} does not take {exchange.method}; it takes {allowed}.")
        return handler

    def _check_secret(self, exchange: Exchange) -> None:
        """Raise unless the request has the secret; without one, unless it is not a browser's cross-site request.

        ``/health`` needs no secret.
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

    # ------------------------------------------------------------------ inference

    def _infer(self, dialect: Dialect, answer: Callable[[Exchange, RequestRecord], Awaitable[None]]) -> Handler:
        """Return the handler of a dialect, which logs each request, refused ones included."""

        async def handler(exchange: Exchange) -> None:
            trace = tracing.begin(dialect.name, exchange.header)
            record = RequestRecord(exchange.request_id, dialect.name, trace)
            with _recorded(exchange, record):
                self._service.admit()
                await answer(exchange, record)

        return handler

    async def _chat(self, exchange: Exchange, record: RequestRecord) -> None:
        call = openai_chat.decode(await exchange.read_body(self._service.max_body_bytes))
        report_call(exchange, call)
        request, created = call.request, int(time.time())
        name = requested_name(exchange, request)
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
        report_call(exchange, call)
        requests = call.requests
        record.is_stream = call.stream
        sse_events = openai_completion_reply.Completion(
            f"cmpl-{secrets.token_hex(12)}",
            requested_name(exchange, requests[0]),
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
        report_call(exchange, call)
        request = on_behalf(exchange, call.request)
        with self._service.models.use(request.model) as model:
            record.model = request.model
            found = await until_disconnect(exchange, model.embed(request))
            record.observe([Started(found.prompt_tokens, 0), Finished(FinishReason.STOP, 0)])
            name = requested_name(exchange, request)
            body = openai_embeddings.reply(name, found.vectors, found.prompt_tokens, is_base64=call.is_base64)
            await exchange.reply(200, body)

    async def _responses(self, exchange: Exchange, record: RequestRecord) -> None:
        call = openai_responses.decode(await exchange.read_body(self._service.max_body_bytes))
        report_call(exchange, call)
        request = call.request
        record.is_stream = call.stream
        context = ResponseContext.of(exchange.header(RESPONSE_CONTEXT))
        sse_events = ResponsesStream(
            context.id or f"resp_{secrets.token_hex(24)}",
            requested_name(exchange, request),
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
        report_call(exchange, call)
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
        report_call(exchange, call)
        await self._count(exchange, call.request, openai_responses.COUNTED, record)

    async def _messages(self, exchange: Exchange, record: RequestRecord) -> None:
        call = anthropic_messages.decode(await exchange.read_body(self._service.max_body_bytes))
        report_call(exchange, call)
        request = call.request
        record.is_stream = call.stream
        sse_events = MessagesStream(f"msg_{secrets.token_hex(12)}", requested_name(exchange, request))
        if call.stream:
            await self._stream(exchange, MESSAGES, (request,), sse_events, record)
        else:
            await self._complete(exchange, (request,), sse_events.sse_events, sse_events.message, record)

    async def _count_tokens(self, exchange: Exchange, record: RequestRecord) -> None:
        call = anthropic_messages.decode(await exchange.read_body(self._service.max_body_bytes))
        report_call(exchange, call)
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
            await reply_json(exchange, {**extra, "input_tokens": num_tokens})

    async def _stream(
        self,
        exchange: Exchange,
        dialect: Dialect,
        requests: Sequence[InferenceRequest],
        projector: Projector,
        record: RequestRecord,
    ) -> None:
        requests = [on_behalf(exchange, request) for request in requests]

        async def sse_events() -> AsyncGenerator[bytes, None]:
            async for events in self._events(exchange, requests, record):
                if encoded := projector.sse_events(events):
                    yield encoded

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
        requests = [on_behalf(exchange, request) for request in requests]

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
            UnsupportedParameterError: the newest message has such a part.
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
            report_ignored(exchange, await model.left_out(requests[0]))
            run = model.infer(requests[0]) if len(requests) == 1 else infer_all(model, requests)
            async with aclosing(run) as batches:
                async for events in batches:
                    record.observe(events)
                    yield events


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


async def _reply_error(exchange: Exchange, error: ErrorInfo) -> None:
    headers: list[Header] = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", retry_after(error.retry_after_s)))
    envelope = envelope_for(exchange.path)
    await exchange.reply(envelope.status(error), envelope.body(error, exchange.request_id), headers=headers)
