"""Inference requests: read, peek, route, send to a node, stream back.

A body goes to the node unchanged, except for the model's name where the client used an alias; an answer comes back
unchanged, as whole SSE events or as one JSON object of its dialect. An error before the first byte keeps its HTTP
status, a later one ends the stream in the request's dialect. :mod:`cortex.fleet.dispatch` routes, loads and retries.
One module: its functions share the steps of one request.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

import msgspec

from cortex import tracing
from cortex._fast.fast_path import FastRequest
from cortex._fast.peek import splice
from cortex._fast.record import Record
from cortex.access.authenticator import UNCOUNTED, Authenticator, Reservation, principal_of
from cortex.access.keys import Principal, check_model
from cortex.config import Config
from cortex.dialects.dialect import Dialect
from cortex.dialects.parameters import add_header
from cortex.dialects.registry import CHAT, COMPACT, RESPONSES
from cortex.dialects.renamed import RenamedStream, rename
from cortex.dialects.responses.context import NO_CONTEXT
from cortex.dialects.translate import TranslatedAnswer, Translation, to_chat
from cortex.dialects.usage import Usage
from cortex.errors import NotAnAnswerError
from cortex.event_stream import EventStream, serve_stream
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.dispatch import Dispatcher
from cortex.fleet.node_request import NodeRequest, NodeResponse
from cortex.fleet.refusals import find_error, read_error
from cortex.http_io import ClientDisconnectedError, EndedByDisconnect, Exchange
from cortex.request_log import RequestLog
from cortex.responses.hook import PreparedResponse, ResponseRequest, ResponsesHook
from cortex.stream_forwarding import DialectForwarder, Forwarding
from cortex.upstream import Header
from cortex.wire.errors import ApiError, MissingParameterError, RemoteError, UpstreamError, UpstreamTimeoutError
from cortex.wire.headers import (
    CLIENT_CLOSED_REQUEST,
    FORWARDED,
    IGNORED,
    OMITTED_PARTS,
    PRINCIPAL,
    PRIORITY,
    REPORT_USAGE,
    REQUEST_ID,
    model_name_headers,
)

log = logging.getLogger("cortex.inference")

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Maximum size of an answer that is not streamed; it is held whole, so that a cut one is an error, not half a body."""

JSON = b"application/json"
TO_EVERY_NODE: tuple[Header, ...] = ((b"content-type", JSON), (REPORT_USAGE, b"1"))


class Inference:
    """Inference endpoints of every dialect. One for the life of a process."""

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        dispatcher: Dispatcher,
        request_log: RequestLog,
        authenticator: Authenticator,
    ) -> None:
        self.reconfigure(config, catalogue)
        self._dispatcher = dispatcher
        self._request_log = request_log
        self._authenticator = authenticator

    def reconfigure(self, config: Config, catalogue: Catalogue) -> None:
        """Replace the configuration and the catalogue."""
        self._max_body_bytes = config.gateway.max_body_bytes
        self._catalogue = catalogue
        self._is_strict = config.access.strict

    def endpoint(self, dialect: Dialect, hook: ResponsesHook | None = None) -> Callable[[Exchange], Awaitable[None]]:
        """Return the endpoint of ``dialect``. ``hook`` has the steps before and after a node's answer, if any."""

        async def answer(exchange: Exchange) -> None:
            fast_request = _fast_request_of(exchange)
            record = Record(exchange.request_id, dialect.name) if fast_request is None else fast_request.record
            record.trace = tracing.begin(dialect.name, exchange.header)
            try:
                await self._infer(exchange, dialect, record, hook)
            except ClientDisconnectedError:
                record.status, record.finish = CLIENT_CLOSED_REQUEST, "disconnected"
                raise
            except ApiError as error:
                record.status, record.finish = error.status, error.code
                raise
            finally:
                self._request_log.record(record)

        return answer

    async def _infer(self, exchange: Exchange, dialect: Dialect, record: Record, hook: ResponsesHook | None) -> None:
        fast_request = _fast_request_of(exchange)
        principal = principal_of(exchange.caller)
        record.key = principal.name
        body = await exchange.read_body(self._max_body_bytes)
        parameters = dialect.parameters
        found = parameters.read(body)
        if found.unknown:
            strict = self._is_strict if principal.is_strict is None else principal.is_strict
            if strict:
                raise parameters.unknown(found.unknown[0])
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
        generates = dialect.generates
        prepared, context = None, NO_CONTEXT
        if hook is not None:
            prepared = await hook.before(ResponseRequest(exchange, dialect, record, principal, name, body, found))
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
            take_begun=_nothing if fast_request is None else fast_request.take,
        )
        call = _NodeCall(node_request, chat, prepared if prepared is not None and prepared.has_after else None)
        reservation = (
            UNCOUNTED
            if principal.limits.are_none
            else await self._authenticator.admit(principal, body, generates=generates)
        )
        has_left = False
        try:
            if prepared is not None and context.background:
                await prepared.serve_in_background(reservation, partial(self._generate, dialect, call))
            elif record.is_stream:
                await self._stream(exchange, dialect, record, call)
            else:
                await self._answer(exchange, dialect, record, call)
        except ClientDisconnectedError:
            has_left = True
            raise
        except UpstreamTimeoutError:
            has_left = not record.is_stream  # its node may have been at it for all of `answer_s`
            raise
        finally:
            if reservation is not UNCOUNTED:
                await reservation.settle(_used(record, reservation, has_left=has_left))

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

    async def _answer(self, exchange: Exchange, dialect: Dialect, record: Record, call: "_NodeCall") -> None:
        with EndedByDisconnect(exchange):
            answer = await self._dispatcher.ask(call.node_request)
            _add_headers(answer, call, exchange)
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

    async def _stream(self, exchange: Exchange, dialect: Dialect, record: Record, call: "_NodeCall") -> None:
        forwarder = DialectForwarder(record)

        def end_in_failure(error: ApiError) -> bytes:
            record.status, record.finish = error.status, error.code
            return dialect.failure(error.info(), forwarder.first, b"".join(forwarder.tail))

        def heartbeat() -> bytes:
            progress = self._dispatcher.load_progress(call.node_request.model)
            return dialect.heartbeat if progress is None else dialect.loading(call.node_request.model, progress)

        async def write(out: EventStream) -> None:
            answer = await self._dispatcher.ask(call.node_request)
            _add_headers(answer, call, exchange)
            if not out.writes_at_once or answer.is_chat or answer.renamed or call.prepared is not None:
                async with aclosing(self._pull(answer, forwarder, record, call)) as sse_events:
                    async for some in sse_events:
                        await out.write(some)
                return

            forwarder.out = out
            with Forwarding(answer, forwarder):
                await answer.response.forward(forwarder)

        record.status = 200
        try:
            await serve_stream(exchange, write, heartbeat=heartbeat, error_event=end_in_failure)
        finally:
            forwarder.record_end(dialect)

    async def _pull(
        self, answer: NodeResponse, forwarder: DialectForwarder, record: Record, call: "_NodeCall"
    ) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a node's stream to send to the client.

        Raises:
            UpstreamError: the stream broke, fell silent or ended before its terminator.
        """
        unreadable: NotAnAnswerError | None = None
        with Forwarding(answer, forwarder):
            read = answer.response.read
            reader = call.reader(answer)
            more = True
            while more:
                data = await read()
                more = bool(data)
                if reader is not None:
                    data = reader.sse_events(data) if more else reader.end()
                sse_events = forwarder.take(data)
                if sse_events:
                    if call.prepared is not None and forwarder.is_complete:
                        try:
                            sse_events = await call.prepared.after_stream(sse_events)
                        except NotAnAnswerError as error:
                            answer.record_broken(error)
                            unreadable = error
                            break
                    yield sse_events
                forwarder.check()
        if unreadable is not None:
            raise unreadable

    async def _generate(
        self, dialect: Dialect, call: "_NodeCall", record: Record, reservation: Reservation
    ) -> AsyncGenerator[bytes, None]:
        """Yield the SSE events of a response without a client, and record its end."""
        call = _NodeCall(msgspec.structs.replace(call.node_request, on_node=record.record_node), call.chat, None)
        forwarder = DialectForwarder(record)
        record.status = 200
        try:
            answer = await self._dispatcher.ask(call.node_request)
            async with aclosing(self._pull(answer, forwarder, record, call)) as sse_events:
                async for some in sse_events:
                    yield some
        except ApiError as error:
            record.status, record.finish = error.status, error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.status, record.finish = CLIENT_CLOSED_REQUEST, "cancelled"
            raise
        finally:
            forwarder.record_end(dialect)
            self._request_log.record(record)
            await reservation.settle(_used(record, reservation, has_left=record.finish == "cancelled"))


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


def _fast_request_of(exchange: Exchange) -> FastRequest | None:
    """Return the fast path's state of a request that began there."""
    assert exchange.fast_request is None or isinstance(exchange.fast_request, FastRequest)
    return exchange.fast_request


def _used(record: Record, reservation: Reservation, *, has_left: bool) -> int:
    """Return the tokens that a request costs: the node's counts, or an estimate if the client disconnected before them.

    An unfinished answer that is not streamed costs the tokens reserved for it, which is also the most an estimate
    costs.
    """
    used: int = record.tokens_used(reservation.need.prompt_tokens)
    if used or not has_left or not record.node:
        return used
    reserved = reservation.reserved_tokens
    return min(reservation.need.prompt_tokens, reserved) if record.is_stream else reserved


def _nothing() -> None:
    return None


def principal_headers(principal: Principal) -> list[Header]:
    """Return the headers that name the principal and its priority to a node."""
    headers = []
    if principal.name:
        headers.append((PRINCIPAL, principal.name.encode()))
    if principal.priority:
        headers.append((PRIORITY, b"%d" % principal.priority))
    return headers


def _add_headers(answer: NodeResponse, call: "_NodeCall", exchange: Exchange) -> None:
    """Copy a node's informational headers to the response, with those of the translation."""
    for name in FORWARDED:
        value = answer.response.header(name)
        if value is not None:
            add_header(exchange.extra_headers, name, value)
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
