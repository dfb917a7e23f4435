"""Responses over a WebSocket: each ``response.create`` is an exchange whose stream goes out as messages.

A request is handled as ``POST /v1/responses`` is, so that limits, routing, records and errors are the same;
here its SSE events become messages, and an answer that is no stream an ``error`` message. Requests of one
lane (``stream_id``) are handled in order, lanes at the same time. A connection keeps its latest responses, stored or
not, so that a client sends only new items; if a request that continues one fails, that one is dropped, as OpenAI does.
``generate: false`` keeps a conversation without generating an answer.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from cortex._fast.sse import SseDecoder
from cortex.dialects.openai_errors import error_object
from cortex.dialects.registry import RESPONSES
from cortex.http_io import AsgiExchange, Exchange, Receive, Scope, Send
from cortex.responses.socket_memory import ConnectionHistory
from cortex.wire.errors import ApiError, InvalidJsonError, InvalidRequestError, OverloadedError
from cortex.wire.responses_events import ResponsesEvent

MAX_PENDING_REQUESTS = 32
"""Greatest number of requests of a connection, running or waiting for their lane."""

GROWTH = 8
"""Greatest ratio of an event's length to a message's: events repeat the request, in JSON of their own."""

CREATE = "response.create"
TOO_BIG = 1009
INTERNAL_ERROR = 1011
"""Close codes: a message longer than the limit of a body, and an internal error."""

_NOT_FORWARDED = frozenset(
    {b"connection", b"upgrade", b"content-encoding", b"content-length", b"content-type", b"transfer-encoding"}
)
_OWN_FIELDS = ("type", "generate", "stream_id", "stream", "background")
_MESSAGE = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STRING = msgspec.json.Decoder(str)
_FAILED = ResponsesEvent.FAILED.value.encode()


@dataclass(frozen=True, slots=True)
class SocketRequest:
    """Origin of an exchange that is a message on a WebSocket."""

    history: ConnectionHistory
    """Conversations of the connection."""
    generates: bool
    """Whether an answer is wanted, and not only that the conversation is known."""


class ResponsesSocket:
    """A connection. ``handle`` answers an exchange."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        handle: Callable[[Exchange], Awaitable[None]],
        new_request_id: Callable[[], str],
        max_message_bytes: int,
        history: ConnectionHistory,
    ) -> None:
        """``history`` holds the latest conversations of the connection."""
        self._receive = receive
        self._send = send
        self._handle = handle
        self._new_request_id = new_request_id
        self._max_message_bytes = max_message_bytes
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name not in _NOT_FORWARDED and not name.startswith(b"sec-websocket")
        ]
        self._scope = {
            "type": "http",
            "method": "POST",
            "path": RESPONSES.path,
            "query_string": scope.get("query_string", b""),
            "headers": [*headers, (b"content-type", b"application/json")],
            "client": scope.get("client"),
        }
        self._history = history
        self._lanes: dict[str | None, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending_bytes = 0
        """Size of the messages of all requests that have not ended."""
        self._left = asyncio.Event()

    async def serve(self) -> None:
        """Answer requests until the client disconnects; running ones are cancelled then."""
        if (await self._receive())["type"] != "websocket.connect":
            return
        await self._send({"type": "websocket.accept"})
        try:
            while (message := await self._receive())["type"] != "websocket.disconnect":
                text = message.get("text")
                data = message.get("bytes") or b"" if text is None else text.encode()
                if len(data) > self._max_message_bytes:
                    await self._send({"type": "websocket.close", "code": TOO_BIG, "reason": "message too big"})
                    return
                await self._take(data)
        finally:
            self._left.set()
            # A running request sees the client disconnect as over HTTP; a waiting one is dropped.
            if self._tasks:
                await asyncio.wait(self._tasks)
            self._history.clear()

    async def _take(self, data: bytes) -> None:
        """Begin a request, or refuse the message."""
        lane: str | None = None
        try:
            fields = _fields(data)
            lane = _text(fields, "stream_id")
            if (kind := _text(fields, "type")) != CREATE:
                raise InvalidRequestError(f"Invalid 'type': '{kind}' is not known; '{CREATE}' is.", param="type")
            if len(self._tasks) >= MAX_PENDING_REQUESTS:
                raise OverloadedError(f"{MAX_PENDING_REQUESTS} responses are under way on this connection.")
            if self._tasks and self._pending_bytes + len(data) > self._max_message_bytes:
                raise OverloadedError(
                    f"The messages under way on this connection would be more than {self._max_message_bytes} bytes: "
                    "send the next when one has been answered."
                )
        except ApiError as error:
            await self._refuse(error, lane)
            return
        generates = bytes(fields.get("generate", b"true")) != b"false"
        if bytes(fields.get("background", b"false")) == b"true":
            await self._refuse(
                InvalidRequestError("'background' is not supported over a WebSocket.", param="background"), lane
            )
            return
        body = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
        before = self._lanes.get(lane)
        encoded = msgspec.json.encode(body | {"stream": True})
        task = asyncio.create_task(self._respond(encoded, _previous(fields), generates, lane, before))
        self._lanes[lane] = task
        self._tasks.add(task)
        size_bytes = len(encoded)
        self._pending_bytes += size_bytes
        task.add_done_callback(lambda done: self._end(done, lane, size_bytes))

    def _end(self, task: "asyncio.Task[None]", lane: str | None, size_bytes: int) -> None:
        self._tasks.discard(task)
        self._pending_bytes -= size_bytes
        if self._lanes.get(lane) is task:
            del self._lanes[lane]
        task.exception()  # it has been logged, and has closed the connection

    async def _respond(
        self, body: bytes, previous: str, generates: bool, lane: str | None, before: "asyncio.Task[None] | None"
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        if self._left.is_set():
            return
        answer = _Answer(self._send, lane, GROWTH * self._max_message_bytes)
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            await self._left.wait()
            return {"type": "http.disconnect"}

        exchange = AsgiExchange(dict(self._scope), receive, answer.take, request_id=self._new_request_id())
        exchange.origin = SocketRequest(self._history, generates)
        try:
            await self._handle(exchange)
        except Exception:
            # Too late for an error event.
            await self._send({"type": "websocket.close", "code": INTERNAL_ERROR, "reason": "internal error"})
            raise
        finally:
            if answer.failed:
                self._history.pop(previous, None)

    async def _refuse(self, error: ApiError, lane: str | None) -> None:
        info = error.info()
        await self._send(_text_message(_error(info.status, error_object(info)), lane))


async def refuse_socket(scope: Scope, send: Send, error: ApiError) -> None:
    """Refuse a handshake with an error's status, if the server supports that; else with 403."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close"})
        return
    body = b'{"error":%b}' % error_object(error.info())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


class _Answer:
    """The response of an exchange, as messages."""

    def __init__(self, send: Send, lane: str | None, max_event_bytes: int) -> None:
        self._send = send
        self._lane = lane
        self._status = 0
        self._is_stream = False
        self._decoder = SseDecoder(max_event_bytes)
        self._body = b""
        self.failed = False
        """Whether the response is an error, or ended with one."""

    async def take(self, message: Any) -> None:
        """Send an ASGI message of an HTTP response."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = dict(message["headers"])
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            return
        data = message.get("body", b"")
        if self._is_stream:
            sse_events = self._decoder.feed(data)
            for sse_event in sse_events:
                self.failed = self.failed or sse_event.event == _FAILED
                await self._send(_text_message(sse_event.data, self._lane))
            return
        self._body += data
        if not message.get("more_body", False):
            try:
                error = bytes(_MESSAGE.decode(self._body)["error"])
            except (msgspec.DecodeError, KeyError):
                error = error_object(ApiError("The answer cannot be read.").info())
            self.failed = True
            await self._send(_text_message(_error(self._status, error), self._lane))


def _previous(fields: dict[str, msgspec.Raw]) -> str:
    """Return the id of the response that a message continues; empty if it is not a string, which is refused later."""
    try:
        return _text(fields, "previous_response_id") or ""
    except InvalidRequestError:
        return ""


def _fields(data: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _MESSAGE.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidJsonError("The message is not a JSON object.") from None


def _text(fields: dict[str, msgspec.Raw], name: str) -> str | None:
    value = fields.get(name)
    if value is None or bytes(value) == b"null":
        return None
    try:
        return _STRING.decode(value)
    except msgspec.DecodeError:
        raise InvalidRequestError(f"Invalid '{name}': it must be a string.", param=name) from None


def _error(status: int, error: bytes) -> bytes:
    return b'{"type":"error","status":%d,"error":%b}' % (status, error)


def _text_message(data: bytes, lane: str | None) -> dict[str, Any]:
    if lane is not None:
        data = data[:-1] + b',"stream_id":' + orjson.dumps(lane) + b"}"
    return {"type": "websocket.send", "text": data.decode()}
