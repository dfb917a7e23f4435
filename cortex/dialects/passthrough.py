"""What a gateway must know of a dialect whose bodies and streams it passes on unchanged.

Where it is asked, how an error is written before and after the first byte, and where a finished answer says why it
ended and what it cost. No body is built or changed here; the reading is of an answer's last bytes, once, at its end.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from cortex.dialects.openai_errors import error_body, error_object, response_error_code
from cortex.wire.errors import ErrorInfo
from cortex.wire.responses_events import LAST, ResponsesEvent

TAIL_CHUNKS = 4
"""Chunks kept of a stream: the finish, the usage, the terminator and the node's own usage may come one by one."""


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
    prompt_tokens_details: TokenDetails | None = None
    input_tokens_details: TokenDetails | None = None

    @property
    def tokens_in(self) -> int:
        """Prompt tokens."""
        return self.prompt_tokens or self.input_tokens or 0

    @property
    def tokens_out(self) -> int:
        """Generated tokens."""
        return self.completion_tokens or self.output_tokens or 0

    @property
    def tokens_cached(self) -> int:
        """Prompt tokens that were in the node's prefix cache."""
        details = self.prompt_tokens_details or self.input_tokens_details
        return self.cached_tokens or (details.cached_tokens if details else 0) or 0


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: Usage | None = None
    choices: tuple[_Choice, ...] = ()
    status: str | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One client language, as far as passing it on goes."""

    name: str
    path: str
    error_body: Callable[[ErrorInfo], bytes]
    """The body of an error before the first byte."""
    failure: Callable[[ErrorInfo, bytes, bytes], bytes]
    """The frames that end a stream in failure, given the first and the last bytes that were sent of it."""
    finish: "re.Pattern[bytes]"
    """Finds why a stream ended in its last bytes."""


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
    finish = answer.choices[0].finish_reason if answer.choices else answer.status
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
    return {
        "id": "",
        "object": "response",
        "created_at": int(time.time()),
        "model": "",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


# Inside a JSON string every quote is escaped, so these are found in structure only.
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?(\d+)')

CHAT = Dialect(
    "openai-chat",
    "/v1/chat/completions",
    error_body,
    chat_failure,
    re.compile(rb'"finish_reason": ?"(\w+)"'),
)
RESPONSES = Dialect(
    "openai-responses",
    "/v1/responses",
    error_body,
    responses_failure,
    re.compile(b"^event: ?(%s)\r?$" % b"|".join(re.escape(name.encode()) for name in sorted(LAST)), re.MULTILINE),
)


def error_body_for(path: str) -> Callable[[ErrorInfo], bytes]:
    """Return how an error at ``path`` is written, whether or not anything is there."""
    for prefix, writer in _ENVELOPES:
        if path.startswith(prefix):
            return writer
    return error_body


_ENVELOPES: tuple[tuple[str, Callable[[ErrorInfo], bytes]], ...] = (("/v1/", error_body),)
"""The longest prefix first."""
