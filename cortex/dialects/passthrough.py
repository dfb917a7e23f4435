"""Properties of the dialects whose bodies and streams the gateway forwards unchanged.

For each dialect: its path, its errors before and after the first byte, and the place of finish and usage in an answer.
No body is built or changed here; only an answer's last bytes are read, once, at its end.
"""

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import orjson

from cortex._fast.peek import PeekError, peek
from cortex._fast.responses_stream import ResponsesStream
from cortex._fast.sse import SseDecoder
from cortex.dialects import anthropic_errors
from cortex.dialects.openai_errors import error_body, error_object, response_error_code
from cortex.wire.errors import ErrorInfo, UpstreamError
from cortex.wire.events import Tokens
from cortex.wire.headers import RESPONSE_CONTEXT
from cortex.wire.responses_events import LAST, ResponsesEvent

STATUS_OF_TYPE = {
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
    "invalid_request_error": 400,
    "overloaded_error": 529,
}
"""HTTP status of an error within a stream, by the error type of either family."""

STATUS_OF_CODE = {
    "device_worker_lost": 503,
    "answer_cut": 503,
    "out_of_memory": 503,
    "model_not_ready": 503,
    "service_unavailable": 503,
    "rate_limit_exceeded": 429,
    "internal_error": 500,
    "non_finite_logits": 500,
}
"""HTTP status by a neuron's own error codes, which are more exact."""

VAGUE = frozenset({"failed", "server_error", "invalid_prompt"})
"""Codes that are less specific than the status."""

TAIL_CHUNKS = 4
"""Number of chunks kept of a stream: finish, usage, terminator and the node's own usage may come one by one."""


class ResponseContext(msgspec.Struct, frozen=True, omit_defaults=True):
    """Members of a response object that the gateway decides; a neuron repeats them in the response.

    With an empty ``id`` the neuron chooses one.
    """

    id: str = ""
    store: bool = False
    previous_response_id: str = ""
    background: bool = False
    conversation: str = ""

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the header that carries it; none if every member has its default."""
        text = msgspec.json.encode(self)
        return () if text == b"{}" else ((RESPONSE_CONTEXT, text),)

    @classmethod
    def of(cls, header: bytes | None) -> "ResponseContext":
        """Return the context of a header; the default where the header is absent or not a gateway's."""
        try:
            return _CONTEXT.decode(header or b"{}")
        except (msgspec.DecodeError, UnicodeError):
            return cls()


NO_CONTEXT = ResponseContext()
"""Context of a request that came from no gateway."""

_CONTEXT = msgspec.json.Decoder(ResponseContext)


class TokenDetails(msgspec.Struct, frozen=True):
    """Cached part of a prompt."""

    cached_tokens: Tokens | None = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts as a dialect or a neuron writes them."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    cached_tokens: Tokens | None = None
    cache_read_input_tokens: Tokens | None = None
    cache_creation_input_tokens: Tokens | None = None
    prompt_tokens_details: TokenDetails | None = None
    input_tokens_details: TokenDetails | None = None

    @property
    def tokens_in(self) -> int:
        """Number of prompt tokens. Anthropic counts tokens read from or written to a cache separately."""
        beside = (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)
        return self.prompt_tokens or (self.input_tokens or 0) + beside

    @property
    def tokens_out(self) -> int:
        """Number of generated tokens."""
        return self.completion_tokens or self.output_tokens or 0

    @property
    def tokens_cached(self) -> int:
        """Number of prompt tokens found in the node's prefix cache."""
        details = self.prompt_tokens_details or self.input_tokens_details
        in_details = details.cached_tokens if details else 0
        return self.cached_tokens or self.cache_read_input_tokens or in_details or 0

    def counts(self) -> tuple[int, int, int]:
        """Return all three."""
        return self.tokens_in, self.tokens_out, self.tokens_cached


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None


class _Object(msgspec.Struct, frozen=True):
    pass


class _Chosen(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...]
    usage: msgspec.Raw = msgspec.Raw(b"")

    @property
    def finish(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


class _Embedded(msgspec.Struct, frozen=True):
    data: tuple[_Object, ...]
    usage: msgspec.Raw = msgspec.Raw(b"")
    finish: msgspec.UnsetType = msgspec.UNSET


class _Responded(msgspec.Struct, frozen=True):
    output: tuple[_Object, ...]
    status: str | None = None
    usage: msgspec.Raw = msgspec.Raw(b"")

    @property
    def finish(self) -> str | None:
        return self.status


class _Messaged(msgspec.Struct, frozen=True):
    content: tuple[_Object, ...]
    stop_reason: str | None = None
    usage: msgspec.Raw = msgspec.Raw(b"")

    @property
    def finish(self) -> str | None:
        return self.stop_reason


class _Counted(msgspec.Struct, frozen=True):
    input_tokens: Tokens
    usage: msgspec.Raw = msgspec.Raw(b"")
    finish: msgspec.UnsetType = msgspec.UNSET


_Whole = _Chosen | _Embedded | _Responded | _Messaged | _Counted
"""Minimum content of a whole answer of each dialect."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Form of an error before the first byte."""

    status: Callable[[ErrorInfo], int]
    body: Callable[[ErrorInfo, str], bytes]
    """Encoder of the body, from the error and the request id."""


@dataclass(frozen=True)
class Dialect:
    """Client dialect, as far as forwarding needs it."""

    name: str
    path: str
    failure: Callable[[ErrorInfo, bytes, bytes], bytes]
    """Encoder of the SSE events that end a stream in failure, given the first and the last bytes sent of it."""
    finish: "re.Pattern[bytes]"
    """Pattern of the finish in a stream's last bytes."""
    heartbeat: bytes
    """SSE event without content, which the dialect's clients accept between any two others."""
    streams: bool = True
    """Whether answers can be streamed."""
    whole: "msgspec.json.Decoder[_Whole]" = field(default_factory=lambda: msgspec.json.Decoder(_Chosen))
    """Decoder of an answer that is not streamed."""

    @functools.cached_property
    def target(self) -> bytes:
        """Request target of the path."""
        return self.path.encode()

    def read(self, body: bytes) -> tuple[Usage | None, str] | None:
        """Return the usage and the finish of an answer that was not streamed, as far as it has them.

        ``None`` if it is no answer: no complete JSON object, or one of another kind.
        """
        try:
            peek(body)
            answer = self.whole.decode(body)
        except (PeekError, msgspec.MsgspecError, ValueError, RecursionError):
            return None
        usage = read_usage(bytes(answer.usage)) if answer.usage else None
        return usage, clean_finish(answer.finish) if answer.finish else ""

    def read_failure(self, last: bytes) -> ErrorInfo:
        """Return the error that a node ended a stream with, given the last bytes of that."""
        sse_events = reversed(SseDecoder(len(last) + 1).feed(last))
        found = [error for sse_event in sse_events if (error := _error_in(sse_event.data)) is not None]
        # The last event of a response has few codes; the one before it has the error's own.
        exact = (error for error in found if error.code not in VAGUE)
        return next(exact, None) or next(iter(found), ErrorInfo(UpstreamError.status, "failed", "The node failed."))

    def loading(self, model: str, progress: float) -> bytes:
        """Return a heartbeat with the progress of a model's load, where the dialect's heartbeat is a comment."""
        if not self.heartbeat.startswith(b":"):
            return self.heartbeat
        return f": loading {model} {progress:.0%}\n\n".encode()


def read_usage(text: bytes) -> Usage | None:
    """Return the counts in a usage object; ``None`` if it is none."""
    try:
        return msgspec.json.decode(text, type=Usage)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _error_in(data: bytes) -> ErrorInfo | None:
    """Return the error in an event of any dialect; its status is that of its code, where the code is one of ours."""
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(event, dict):
        return None
    error = event.get("error")
    if error is None and event.get("type") == "error":
        error = event
    if isinstance(event.get("response"), dict):
        error = event["response"].get("error")
    if not isinstance(error, dict):
        return None
    details, code, kind = error.get("details"), error.get("code"), error.get("type")
    if code is None and isinstance(details, dict):
        code = details.get("error_code")
    code = clean_finish(code) if isinstance(code, str) else "failed"
    status = STATUS_OF_CODE.get(code) or STATUS_OF_TYPE.get(str(kind)) or UpstreamError.status
    message = error.get("message")
    return ErrorInfo(status, code, message if isinstance(message, str) else "The node failed.")


def clean_finish(finish: str) -> str:
    """Return an answer's finish for the log: a node chooses it, so that only a plain word is kept."""
    return finish if _FINISH.fullmatch(finish) else "other"


def chat_failure(error: ErrorInfo, first: bytes, last: bytes) -> bytes:
    """Return the SSE event that ends a chat stream in failure. No ``[DONE]`` follows it."""
    return b"data: " + error_body(error) + b"\n\n"


def responses_failure(error: ErrorInfo, first: bytes, last: bytes) -> bytes:
    """Return ``error`` and ``response.failed``, going on with the stream's own response and sequence numbers."""
    sequence = 0
    for match in _SEQUENCE_NUMBER.finditer(last):
        sequence = max(sequence, int(match[1]) + 1)
    response = _begun_response(first)
    response |= {"status": "failed", "error": {"code": response_error_code(error), "message": error.message}}
    events: list[dict[str, Any]] = [
        {
            "type": ResponsesEvent.ERROR,
            "sequence_number": sequence,
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "error": orjson.Fragment(error_object(error)),
        },
        {"type": ResponsesEvent.FAILED, "sequence_number": sequence + 1, "response": response},
    ]
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n" for event in events
    )


def messages_failure(error: ErrorInfo, first: bytes, last: bytes) -> bytes:
    """Return the event that ends a Messages stream in failure."""
    return b"event: error\ndata: " + anthropic_errors.error_body(error) + b"\n\n"


def _begun_response(first: bytes) -> dict[str, Any]:
    """Return the response object that a stream began with, or one like it if it had not begun."""
    for line in first.splitlines():
        if not line.startswith(b"data:"):
            continue
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:
            break
        response = event.get("response") if isinstance(event, dict) else None
        if isinstance(response, dict):
            return response
        break
    # With all that a response has, as clients of the specification accept no other.
    created: dict[str, Any] = orjson.loads(ResponsesStream("", "", int(time.time()), b"{}").beginning())
    return created


_FINISH = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# Inside a JSON string every quote is escaped, so these are found in structure only.
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?(\d{1,15})\b')

COMMENT = b": keep-alive\n\n"
"""Only heartbeat that OpenAI's clients accept: an event without their payload is an error to them."""

PING = b'event: ping\ndata: {"type":"ping"}\n\n'

CHAT = Dialect(
    "openai-chat",
    "/v1/chat/completions",
    chat_failure,
    re.compile(rb'"finish_reason": ?"(\w+)"'),
    COMMENT,
)
COMPLETIONS = replace(CHAT, name="openai-completions", path="/v1/completions")
RESPONSES = Dialect(
    "openai-responses",
    "/v1/responses",
    responses_failure,
    re.compile(b"^event: ?(%s)\r?$" % b"|".join(re.escape(name.encode()) for name in sorted(LAST)), re.MULTILINE),
    COMMENT,
    whole=msgspec.json.Decoder(_Responded),
)
COMPACT = replace(RESPONSES, path="/v1/responses/compact", streams=False)
INPUT_TOKENS = replace(
    RESPONSES, path="/v1/responses/input_tokens", streams=False, whole=msgspec.json.Decoder(_Counted)
)
MESSAGES = Dialect(
    "anthropic-messages",
    "/v1/messages",
    messages_failure,
    re.compile(rb'"stop_reason": ?"(\w+)"'),
    PING,
    whole=msgspec.json.Decoder(_Messaged),
)
EMBEDDINGS = replace(
    CHAT,
    name="openai-embeddings",
    path="/v1/embeddings",
    streams=False,
    whole=msgspec.json.Decoder(_Embedded),
)
COUNT_TOKENS = replace(MESSAGES, path="/v1/messages/count_tokens", streams=False, whole=msgspec.json.Decoder(_Counted))


def envelope_for(path: str) -> Envelope:
    """Return the form of errors at ``path``, whether or not it exists."""
    if path == MESSAGES.path or path.startswith(f"{MESSAGES.path}/"):
        return _ANTHROPIC
    return _OPENAI


_OPENAI = Envelope(lambda error: error.status, lambda error, request_id: error_body(error))
_ANTHROPIC = Envelope(anthropic_errors.error_status, anthropic_errors.error_body)
