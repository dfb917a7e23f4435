"""The dialect as values: the messages, and the count of their tokens."""

import pathlib
import re

import msgspec

from cortex.dialects.dialect import Counted, Dialect, JsonObject, WholeAnswer
from cortex.dialects.messages import errors, request
from cortex.dialects.schema import COUNT, LIST, OBJECT, TEXT, TEXT_OR_NULL, object_with
from cortex.dialects.token_count import CountCall
from cortex.wire.errors import ErrorInfo

PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class _Message(WholeAnswer, frozen=True):
    content: tuple[JsonObject, ...]
    finish: str | None = msgspec.field(name="stop_reason", default=None)


def _failure(error: ErrorInfo, first: bytes, last: bytes) -> bytes:
    """Return the event that ends a stream in failure."""
    return b"event: error\ndata: " + errors.error_body(error) + b"\n\n"


def _decode_count(body: bytes) -> CountCall:
    return CountCall.of(request.decode(body))


MESSAGES = Dialect(
    "anthropic-messages",
    "/v1/messages",
    "Answer messages.",
    request.PARAMETERS,
    request.decode,
    object_with(
        id=TEXT, type={"const": "message"}, role={"const": "assistant"}, model=TEXT, content=LIST, usage=OBJECT,
        stop_reason=TEXT_OR_NULL, stop_sequence=TEXT_OR_NULL,
    ),
    _Message,
    finish=re.compile(rb'"stop_reason": ?"(\w+)"'),
    heartbeat=PING,
    envelope=errors.ENVELOPE,
    failure=_failure,
    is_translated=True,
    page=pathlib.Path(__file__).with_name("page.js"),
)  # fmt: skip
COUNT_TOKENS = Dialect(
    MESSAGES.name,
    "/v1/messages/count_tokens",
    "Count a prompt.",
    request.PARAMETERS,
    _decode_count,
    object_with(input_tokens=COUNT),
    Counted,
    envelope=errors.ENVELOPE,
    streams=False,
    generates=False,
    is_translated=True,
)
