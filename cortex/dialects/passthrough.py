"""What a gateway must know of a dialect whose bodies and streams it passes on unchanged.

Where it is asked, how an error is written before and after the first byte, and where a finished answer says why it
ended and what it cost. No body is built or changed here; the reading is of an answer's last bytes, once, at its end.
"""

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import orjson

from cortex._fast.responses_stream import ResponsesStream
from cortex.dialects import anthropic_errors
from cortex.dialects.openai_errors import error_body, error_object, response_error_code
from cortex.wire.errors import ErrorInfo
from cortex.wire.responses_events import LAST, ResponsesEvent

TAIL_CHUNKS = 4
"""Chunks kept of a stream: the finish, the usage, the terminator and the node's own usage may come one by one."""


GATEWAY_PART_HEADER = b"x-cortex-response"


class GatewayPart(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a gateway does with a response, told to a neuron so that the response says so of itself.

    An empty ``id`` leaves that to the neuron.
    """

    id: str = ""
    store: bool = False
    previous_response_id: str = ""
    background: bool = False
    conversation: str = ""

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers that tell it; none if there is nothing to tell."""
        text = msgspec.json.encode(self)
        return () if text == b"{}" else ((GATEWAY_PART_HEADER, text),)

    @classmethod
    def of(cls, header: bytes | None) -> "GatewayPart":
        """Return what a header tells; nothing if it is none of a gateway's."""
        try:
            return _GATEWAY_PART.decode(header or b"{}")
        except (msgspec.DecodeError, UnicodeError):
            return cls()


NO_PART = GatewayPart()
"""Of a request that no gateway has done anything with."""

_GATEWAY_PART = msgspec.json.Decoder(GatewayPart)


class TokenDetails(msgspec.Struct, frozen=True):
    """The part of a prompt that was cached."""

    cached_tokens: int | None = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts as a dialect or a neuron writes them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    prompt_tokens_details: TokenDetails | None = None
    input_tokens_details: TokenDetails | None = None

    @property
    def tokens_in(self) -> int:
        """Prompt tokens. Anthropic counts those that a cache read or wrote beside the others."""
        beside = (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)
        return self.prompt_tokens or (self.input_tokens or 0) + beside

    @property
    def tokens_out(self) -> int:
        """Generated tokens."""
        return self.completion_tokens or self.output_tokens or 0

    @property
    def tokens_cached(self) -> int:
        """Prompt tokens that were in the node's prefix cache."""
        details = self.prompt_tokens_details or self.input_tokens_details
        in_details = details.cached_tokens if details else 0
        return self.cached_tokens or self.cache_read_input_tokens or in_details or 0

    def counts(self) -> tuple[int, int, int]:
        """Return all three."""
        return self.tokens_in, self.tokens_out, self.tokens_cached


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: Usage | None = None
    choices: tuple[_Choice, ...] = ()
    status: str | None = None
    stop_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """How an error before the first byte is written."""

    status: Callable[[ErrorInfo], int]
    body: Callable[[ErrorInfo, str], bytes]
    """Of an error and the id of its request."""


@dataclass(frozen=True)
class Dialect:
    """One client language, as far as passing it on goes."""

    name: str
    path: str
    failure: Callable[[ErrorInfo, bytes, bytes], bytes]
    """The frames that end a stream in failure, given the first and the last bytes that were sent of it."""
    finish: "re.Pattern[bytes]"
    """Finds why a stream ended in its last bytes."""
    heartbeat: bytes
    """A whole frame that says nothing: what the dialect's clients let pass between any two others."""
    streams: bool = True
    """Whether an answer is ever a stream, whatever the body says."""

    @functools.cached_property
    def target(self) -> bytes:
        """What a request asks for."""
        return self.path.encode()

    def loading(self, model: str, progress: float) -> bytes:
        """Return a heartbeat that says how far the load of a model is, where the dialect has room for it."""
        if not self.heartbeat.startswith(b":"):
            return self.heartbeat
        return f": loading {model} {progress:.0%}\n\n".encode()


def read_usage(text: bytes) -> Usage | None:
    """Return the counts in a usage object; ``None`` if it is none."""
    try:
        return msgspec.json.decode(text, type=Usage)
    except (msgspec.ValidationError, msgspec.DecodeError):
        return None


def read_answer(body: bytes) -> tuple[Usage | None, str]:
    """Return the usage and the finish of an answer that was not streamed; neither if it says neither."""
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except (msgspec.ValidationError, msgspec.DecodeError):
        return None, ""
    finish = answer.choices[0].finish_reason if answer.choices else answer.stop_reason or answer.status
    return answer.usage, finish or ""


def chat_failure(error: ErrorInfo, first: bytes, last: bytes) -> bytes:
    """Return the frame that ends a chat stream in failure. No ``[DONE]`` follows it."""
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


# Inside a JSON string every quote is escaped, so these are found in structure only.
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?(\d+)')

COMMENT = b": keep-alive\n\n"
"""The only heartbeat that OpenAI's clients let pass: to them an event without a payload of theirs is an error."""

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
)
COMPACT = replace(RESPONSES, path="/v1/responses/compact", streams=False)
INPUT_TOKENS = replace(RESPONSES, path="/v1/responses/input_tokens", streams=False)
MESSAGES = Dialect(
    "anthropic-messages",
    "/v1/messages",
    messages_failure,
    re.compile(rb'"stop_reason": ?"(\w+)"'),
    PING,
)
EMBEDDINGS = replace(CHAT, name="openai-embeddings", path="/v1/embeddings", streams=False)
COUNT_TOKENS = replace(MESSAGES, path="/v1/messages/count_tokens", streams=False)


def envelope_for(path: str) -> Envelope:
    """Return how an error at ``path`` is written, whether or not anything is there."""
    if path == MESSAGES.path or path.startswith(f"{MESSAGES.path}/"):
        return _ANTHROPIC
    return _OPENAI


_OPENAI = Envelope(lambda error: error.status, lambda error, request_id: error_body(error))
_ANTHROPIC = Envelope(anthropic_errors.error_status, anthropic_errors.error_body)
