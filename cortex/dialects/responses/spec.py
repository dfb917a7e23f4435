"""The dialect as values: responses, compaction of a conversation, and the count of a prompt's tokens."""

import pathlib
import re
import time
from typing import Any

import msgspec
import orjson

from cortex._fast.responses_stream import ResponsesStream
from cortex.dialects.dialect import Counted, Dialect, JsonObject, WholeAnswer
from cortex.dialects.openai_errors import error_object, response_error_code
from cortex.dialects.responses import compaction, request
from cortex.dialects.schema import COUNT, LIST, OBJECT, TEXT, object_with
from cortex.dialects.token_count import CountCall
from cortex.wire.errors import ErrorInfo
from cortex.wire.responses_events import LAST, ResponsesEvent

# Inside a JSON string every quote is escaped, so these are found in structure only.
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?(\d{1,15})\b')


class _Response(WholeAnswer, frozen=True):
    output: tuple[JsonObject, ...]
    finish: str | None = msgspec.field(name="status", default=None)


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
    # With all that a response has, as clients of the specification accept no other.
    created: dict[str, Any] = orjson.loads(ResponsesStream("", "", int(time.time()), b"{}").beginning())
    return created


def _decode_count(body: bytes) -> CountCall:
    request.PARAMETERS.read(body)
    return CountCall.of(request.decode(compaction.with_input(body)), object="response.input_tokens")


RESPONSE = object_with(
    id=TEXT, object={"const": "response"}, created_at={"type": "number"}, model=TEXT, status=TEXT, output=LIST,
    parallel_tool_calls={"type": "boolean"}, tool_choice={}, tools=LIST,
)  # fmt: skip
"""Schema of a response."""

RESPONSES = Dialect(
    "openai-responses",
    "/v1/responses",
    "Make a response.",
    request.PARAMETERS,
    request.decode,
    RESPONSE,
    _Response,
    finish=re.compile(
        b"^event: ?(%s)\r?$" % b"|".join(re.escape(name.encode()) for name in sorted(LAST)), re.MULTILINE
    ),
    failure=responses_failure,
    conversation="input",
    is_translated=True,
    page=pathlib.Path(__file__).with_name("page.js"),
)
COMPACT = Dialect(
    RESPONSES.name,
    "/v1/responses/compact",
    "Sum a conversation up.",
    request.PARAMETERS,
    compaction.decode,
    object_with(id=TEXT, object={"const": "response.compaction"}, created_at=COUNT, output=LIST, usage=OBJECT),
    _Response,
    conversation="input",
    streams=False,
)
INPUT_TOKENS = Dialect(
    RESPONSES.name,
    "/v1/responses/input_tokens",
    "Count a response's prompt.",
    request.PARAMETERS,
    _decode_count,
    object_with(object={"const": "response.input_tokens"}, input_tokens=COUNT),
    Counted,
    conversation="input",
    streams=False,
    generates=False,
    is_translated=True,
)
