"""The daemon's ASGI application: authorisation, and the inference paths of all dialects.

A dialect decodes a body and encodes the ``InferenceEvent``s of its answer; everything between is the same for all.
State lives in the service, inference in the harnesses. Every error has the envelope of its path's dialect. The node's
own paths are in :mod:`neuron.node_api`.
"""

import hmac
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager

import msgspec

from cortex import logs, tracing
from cortex.dialects import registry
from cortex.dialects.call import Answering, Encoder, GenerationCall
from cortex.dialects.dialect import Dialect
from cortex.dialects.embeddings.request import EmbeddingCall
from cortex.dialects.omitted_parts import readable
from cortex.dialects.parameters import add_header
from cortex.dialects.registry import envelope_for
from cortex.dialects.responses.context import ResponseContext
from cortex.dialects.token_count import CountCall
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
from neuron.node_api import Handler, NodeApi
from neuron.service import Service

_log = logging.getLogger("neuron.api")

HOLD_SHARE = 2 / 3
"""Share of the time for which headers are held: a gateway has not sent its own by then, and can forward a node's."""


class Api:
    """The ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._node = NodeApi(service)
        self._routes: dict[str, dict[str, Handler]] = {
            **self._node.routes,
            **{dialect.path: {"POST": self._infer(dialect)} for dialect in registry.DIALECTS},
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

    def _infer(self, dialect: Dialect) -> Handler:
        """Return the handler of a dialect, which logs each request, refused ones included."""

        async def handler(exchange: Exchange) -> None:
            trace = tracing.begin(dialect.name, exchange.header)
            record = RequestRecord(exchange.request_id, dialect.name, trace)
            with _recorded(exchange, record):
                self._service.admit()
                await self._answer(exchange, dialect, record)

        return handler

    async def _answer(self, exchange: Exchange, dialect: Dialect, record: RequestRecord) -> None:
        call = dialect.decode(await exchange.read_body(self._service.max_body_bytes))
        report_call(exchange, call)
        match call:
            case EmbeddingCall():
                await self._embed(exchange, call, record)
            case CountCall():
                await self._count(exchange, dialect, call, record)
            case _:
                await self._generate(exchange, dialect, call, record)

    async def _embed(self, exchange: Exchange, call: EmbeddingCall, record: RequestRecord) -> None:
        request = on_behalf(exchange, call.request)
        with self._service.models.use(request.model) as model:
            record.model = request.model
            found = await until_disconnect(exchange, model.embed(request))
            record.observe([Started(found.prompt_tokens, 0), Finished(FinishReason.STOP, 0)])
            await exchange.reply(
                200, call.answer(found.vectors, found.prompt_tokens, requested_name(exchange, request))
            )

    async def _count(self, exchange: Exchange, dialect: Dialect, call: CountCall, record: RequestRecord) -> None:
        with self._service.models.use(call.request.model) as model:
            record.model = call.request.model
            request = self._readable(exchange, dialect, call.request, model)
            started = Started(await until_disconnect(exchange, model.count_tokens(request)))
            record.observe([started])
            encoder = call.encoder(Answering())
            encoder.sse_events([started])
            await exchange.reply(200, encoder.whole())

    async def _generate(
        self, exchange: Exchange, dialect: Dialect, call: GenerationCall, record: RequestRecord
    ) -> None:
        record.is_stream = call.stream
        reports_usage = exchange.header(REPORT_USAGE) is not None
        context = ResponseContext.of(exchange.header(RESPONSE_CONTEXT))
        encoder = call.encoder(Answering(requested_name(exchange, call.request), reports_usage, context))
        events = self._events(exchange, dialect, [on_behalf(exchange, request) for request in call.requests], record)
        if not call.stream:
            await until_disconnect(exchange, _gather(events, encoder))
            await exchange.reply(200, encoder.whole())
            return

        async def sse_events() -> AsyncGenerator[bytes, None]:
            async for batch in events:
                if encoded := encoder.sse_events(batch):
                    yield encoded

        await stream(
            exchange,
            sse_events(),
            heartbeat=dialect.heartbeat,
            error_event=lambda error: encoder.sse_events([Failed(error.info())]),
            hold_share=HOLD_SHARE,
        )

    def _readable(
        self, exchange: Exchange, dialect: Dialect, request: InferenceRequest, model: Model
    ) -> InferenceRequest:
        """Return a request without what its model cannot take, and have the answer say how much that was.

        Raises:
            UnsupportedParameterError: the newest message has such a part.
        """
        messages, num_omitted = readable(
            request.messages,
            images=Capability.VISION in model.capabilities,
            model=request.model,
            seeing=[one.id for one in self._service.models.statuses() if Capability.VISION in one.capabilities],
            param=dialect.conversation,
        )
        if not num_omitted:
            return request
        num_omitted += int(exchange.extra_headers.get(OMITTED_PARTS, b"0"))
        add_header(exchange.extra_headers, OMITTED_PARTS, b"%d" % num_omitted)
        return msgspec.structs.replace(request, messages=messages)

    async def _events(
        self, exchange: Exchange, dialect: Dialect, requests: Sequence[InferenceRequest], record: RequestRecord
    ) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        """Run the requests of a call on their model, which stays in use until the generator is closed."""
        with self._service.models.use(requests[0].model) as model:
            record.model = requests[0].model
            requests = [self._readable(exchange, dialect, request, model) for request in requests]
            report_ignored(exchange, await model.left_out(requests[0]))
            run = model.infer(requests[0]) if len(requests) == 1 else infer_all(model, requests)
            async with aclosing(run) as batches:
                async for events in batches:
                    record.observe(events)
                    yield events


async def _gather(events: AsyncGenerator[Sequence[InferenceEvent], None], encoder: Encoder) -> None:
    """Encode all events. Raises :class:`RemoteError` as soon as one says that the inference failed."""
    async with aclosing(events) as batches:
        async for batch in batches:
            for event in batch:
                if isinstance(event, Failed):
                    raise RemoteError(event.error)
            encoder.sse_events(batch)


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
