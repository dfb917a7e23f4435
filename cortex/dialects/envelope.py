"""Form of an error before the first byte of an answer: status, body and schema."""

from collections.abc import Callable
from dataclasses import dataclass

from cortex.dialects import openai_errors
from cortex.dialects.schema import TEXT, TEXT_OR_NULL, Schema, object_with
from cortex.wire.errors import ErrorInfo


@dataclass(frozen=True, slots=True)
class Envelope:
    """Form of a dialect's errors."""

    name: str
    """Name of the schema in the OpenAPI document."""
    schema: Schema
    status: Callable[[ErrorInfo], int]
    body: Callable[[ErrorInfo, str], bytes]
    """Encoder of the body, from the error and the request id."""


OPENAI = Envelope(
    "Error",
    object_with(error=object_with(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)),
    lambda error: error.status,
    lambda error, request_id: openai_errors.error_body(error),
)
