"""Inference requests: read, peek, route, send to a node, stream back.

A body goes to the node unchanged, except for the model's name where the client used an alias; an answer comes back
unchanged, as whole SSE events or as one JSON object of its dialect. An error before the first byte keeps its HTTP
status, a later one ends the stream in the request's dialect. :mod:`cortex.fleet.dispatch` routes, loads and retries.
One module: its functions share the steps of one request.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

import msgspec

from cortex._fast.peek import peek, splice
from cortex._fast.record import Record
from cortex.access.authenticator import Authenticator, Reservation
from cortex.access.keys import check_model
from cortex.config import Config
from cortex.dialects.dialect import Dialect
from cortex.dialects.parameters import add_header
from cortex.dialects.registry import CHAT, COMPACT, RESPONSES
from cortex.dialects.renamed import RenamedStream, rename
from cortex.dialects.responses.context import NO_CONTEXT
from cortex.dialects.translate import TranslatedAnswer, Translation, to_chat
from cortex.dialects.usage import Usage
from cortex.errors import NotAnAnswerError
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.dispatch import Dispatcher
from cortex.fleet.node_request import NodeRequest, NodeResponse
from cortex.fleet.refusals import find_error, read_error
from cortex.http_io import EndedByDisconnect
from cortex.pipeline.access import TO_EVERY_NODE, principal_headers
from cortex.pipeline.node_stream import NodeStream
from cortex.pipeline.request import Request, tokens_used
from cortex.request_log import RequestLog
from cortex.responses.hook import PreparedResponse, ResponseRequest, ResponsesHook
from cortex.wire.errors import ApiError, MissingParameterError, RemoteError, UpstreamError
from cortex.wire.headers import (
    CLIENT_CLOSED_REQUEST,
    IGNORED,
    OMITTED_PARTS,
    REQUEST_ID,
    model_name_headers,
)

log = logging.getLogger("cortex.inference")

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Maximum size of an answer that is not streamed; it is held whole, so that a cut one is an error, not half a body."""


class Inference:
    """Inference endpoints of every dialect. One for the life of a process."""

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        dispatcher: Dispatcher,
        request_log: RequestLog,
        authenticator: Authenticator,
        hook: ResponsesHook,
    ) -> None:
        """``hook`` has the steps of requests for responses before and after a node's answer."""
        self.reconfigure(config, catalogue)
        self._dispatcher = dispatcher
        self._request_log = request_log
        self._authenticator = authenticator
        self._hook = hook

    def reconfigure(self, config: Config, catalogue: Catalogue) -> None:
        """Replace the configuration and the catalogue."""
        self._catalogue = catalogue
        self._is_strict = config.access.strict

    def heartbeat(self, dialect: Dialect, model: str) -> bytes:
        """Return the heartbeat of a stream, with the progress of the load that it waits for."""
        progress = self._dispatcher.load_progress(model)
        return dialect.heartbeat if progress is None else dialect.loading(model, progress)

    async def infer(self, request: Request) -> None:
        """Answer a request that cannot be answered at once, or is not forwarded unchanged."""
        exchange, record, dialect, body = request.exchange, request.record, request.access.dialect, request.body
        principal, found = request.access.principal, request.found
        if found.unknown:
            strict = self._is_strict if principal.is_strict is None else principal.is_strict
            if strict:
                raise dialect.parameters.unknown(found.unknown[0])
            add_header(exchange.extra_headers, IGNORED, ",".join(found.unknown).encode())
            log.info("id=%s key=%s ignored=%s", record.request_id, record.key, exchange.extra_headers[IGNORED].decode())
        name = found.model
        if not name:
            raise MissingParameterError("You must provide a model parameter.", param="model")
        model = self._catalogue.resolve(name)
        if not self._dispatcher.has_model(model):
            model = await self._find_model(name, model)
        check_model(principal, model)
        record.model = model
        record.is_stream = found.stream and dialect.streams
        if model != name:
            body = splice(body, found, model)
        headers = [*TO_EVERY_NODE, (REQUEST_ID, exchange.request_id.encode()), *model_name_headers(name, model)]
        if record.trace is not None:
            headers += record.trace.headers
        prepared, context = None, NO_CONTEXT
        if dialect.name == RESPONSES.name:
            prepared = await self._hook.before(ResponseRequest(exchange, dialect, record, principal, name, body, found))
            if prepared is None:
                return
            body, context = prepared.body, prepared.context
            headers += prepared.headers
            if dialect is COMPACT:  # to a node it is a response like any other
                dialect = RESPONSES
        headers += principal_headers(principal)
        chat = to_chat(dialect, body, context, name)
        node_request = NodeRequest(
            model,
            dialect.name,
            dialect.target,
            headers,
            body,
            is_stream=record.is_stream or context.background,
            is_awaited=not context.background,
            arrived_at=record.begun_s,
            cache_key=found.prompt_cache_key,
            principal=principal.name,
            as_chat=None if chat is None else chat.body,
            priority=principal.priority,
            name=name,
            on_node=record.record_node,
            take_begun=request.take_begun,
        )
        call = _NodeCall(node_request, chat, prepared if prepared is not None and prepared.has_after else None)
        if request.reservation is None:
            bounds = found.bounds if prepared is None else peek(body).bounds
            request.reservation = await self._authenticator.admit(
                principal, len(body), bounds, generates=dialect.generates
            )
        if prepared is not None and context.background:
            await prepared.serve_in_background(request.reservation, partial(self._generate, dialect, call))
        elif record.is_stream:
            await request.stream(partial(self._stream, request, call))
        else:
            await self._answer(request, dialect, call)

    async def _find_model(self, name: str, model: str) -> str:
        """Return the id of a model that no node is known to offer, after a first poll of the nodes and a match of
        aliases.

        Raises:
            ModelNotFoundError: no node offers it.
            NoNodeError: no node that was polled offers it.
        """
        has_model = self._dispatcher.has_model
        await self._dispatcher.first_look(lambda: has_model(model))
        if not has_model(model):
            model = self._catalogue.match(name) or model
        if not has_model(model):
            raise self._dispatcher.unknown(name)
        return model

    async def _answer(self, request: Request, dialect: Dialect, call: "_NodeCall") -> None:
        exchange, record = request.exchange, request.record
        with EndedByDisconnect(exchange):
            answer = await self._dispatcher.ask(call.node_request)
            _add_headers(answer, call, request)
            try:
                body = await answer.read(MAX_ANSWER_BYTES)
                record.usage, record.finish = read_whole(answer, CHAT if answer.is_chat else dialect, body)
                if answer.is_chat:
                    body = call.translated().whole(body)
                    record.usage, record.finish = dialect.read(body) or (None, "")
                elif answer.renamed:
                    body = rename(body, answer.renamed)
            finally:
                answer.close()
        record.status = 200
        if call.prepared is not None:
            try:
                body = await call.prepared.after(body)
            except NotAnAnswerError as error:
                answer.record_broken(error)
                raise
        await exchange.reply(200, body)

    async def _stream(self, request: Request, call: "_NodeCall") -> None:
        answer = await self._dispatcher.ask(call.node_request)
        _add_headers(answer, call, request)
        keep = None if call.prepared is None else call.prepared.after_stream
        await request.forward(answer, call.reader(answer), keep)

    async def _generate(
        self, dialect: Dialect, call: "_NodeCall", record: Record, reservation: Reservation
    ) -> AsyncGenerator[bytes, None]:
        """Yield the SSE events of a response without a client, and record its end."""
        call = _NodeCall(msgspec.structs.replace(call.node_request, on_node=record.record_node), call.chat, None)
        node_stream = NodeStream(record)
        record.status = 200
        try:
            answer = await self._dispatcher.ask(call.node_request)
            async with aclosing(_read(answer, node_stream, call.reader(answer))) as sse_events:
                async for some in sse_events:
                    yield some
        except ApiError as error:
            record.status, record.finish = error.status, error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.status, record.finish = CLIENT_CLOSED_REQUEST, "cancelled"
            raise
        finally:
            node_stream.record_end(dialect)
            self._request_log.record(record)
            await reservation.settle(tokens_used(record, reservation, has_left=record.finish == "cancelled"))


async def _read(
    answer: NodeResponse, node_stream: NodeStream, reader: TranslatedAnswer | RenamedStream | None
) -> AsyncGenerator[bytes, None]:
    """Yield the SSE events of a node's stream that no client waits for.

    Raises:
        UpstreamError: the stream broke, fell silent or ended before its terminator.
    """
    error: BaseException | None = None
    node_stream.response = answer.response
    try:
        more = True
        while more:
            data = await answer.response.read()
            more = bool(data)
            if reader is not None:
                data = reader.sse_events(data) if more else reader.end()
            if sse_events := node_stream.take(data):
                yield sse_events
            node_stream.check()
    except BaseException as raised:  # noqa: BLE001 - judged below
        error = raised
    error = node_stream.conclude(answer, error)
    if error is not None:
        raise error


def read_whole(answer: NodeResponse, dialect: Dialect, body: bytes) -> tuple[Usage | None, str]:
    """Return the usage and the finish of a node's answer that is not streamed.

    Raises:
        RemoteError: it is an error, although its status is 200.
        NotAnAnswerError: it is no answer in its dialect.
    """
    found = dialect.read(body)
    if found is not None:
        return found
    if find_error(body) is not None:
        raise RemoteError(read_error(UpstreamError.status, body)[0])
    error = NotAnAnswerError(f"{answer.node} answered 200 with what is no answer: {len(body)} bytes.")
    answer.record_broken(error)
    raise error


def _add_headers(answer: NodeResponse, call: "_NodeCall", request: Request) -> None:
    """Copy a node's informational headers to the response, with those of the translation."""
    request.copy_headers(answer.response)
    exchange = request.exchange
    if answer.is_chat and call.chat is not None:
        decoded = call.chat.call
        if decoded.ignored:
            add_header(exchange.extra_headers, IGNORED, ",".join(decoded.ignored).encode())
        if decoded.num_omitted:
            by_node = int(exchange.extra_headers.get(OMITTED_PARTS, b"0"))
            add_header(exchange.extra_headers, OMITTED_PARTS, b"%d" % (by_node + decoded.num_omitted))


class _NodeCall(NamedTuple):
    """A request to a node, its translation to chat, and the hook's steps after the answer, if it has any."""

    node_request: NodeRequest
    chat: Translation | None
    prepared: PreparedResponse | None

    def reader(self, answer: NodeResponse) -> TranslatedAnswer | RenamedStream | None:
        """Return the reader of a stream that is not forwarded unchanged, if it is one."""
        if answer.is_chat:
            return self.translated()
        return RenamedStream(answer.renamed) if answer.renamed else None

    def translated(self) -> TranslatedAnswer:
        """Return the reader of a chat answer."""
        assert self.chat is not None  # only then is a request sent as chat
        return self.chat.begin()
