"""Errors of the Anthropic dialect: the envelope, its type, and the status where that differs.

SDKs choose their exception by the HTTP status and clients read ``type`` and the words of ``message``: agents compact a
conversation when a prompt "is too long". Our own stable code goes along in ``details``, which clients skip and a
gateway reads.
"""

import msgspec

from cortex.dialects.envelope import Envelope
from cortex.dialects.schema import TEXT, object_with
from cortex.wire.errors import ContextLengthError, ErrorInfo, OverloadedError

OVERLOADED_STATUS = 529
"""Status for an overloaded or unavailable server, where other dialects have 503 or 429."""

_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED_STATUS: "overloaded_error",
}


class _Details(msgspec.Struct, frozen=True, omit_defaults=True):
    error_code: str
    unsupported: tuple[str, ...] = ()


class _Error(msgspec.Struct, frozen=True):
    type: str
    message: str
    details: _Details


class _Envelope(msgspec.Struct, frozen=True, omit_defaults=True):
    type: str
    error: _Error
    request_id: str | None = None


def error_status(error: ErrorInfo) -> int:
    """Return the HTTP status of an error in this dialect."""
    if error.status == 503 or error.code == OverloadedError.code:
        return OVERLOADED_STATUS
    return error.status


def error_type(error: ErrorInfo) -> str:
    """Return the ``type`` of an error."""
    status = error_status(error)
    if status in _TYPES:
        return _TYPES[status]
    return "invalid_request_error" if status < 500 else "api_error"


def error_message(error: ErrorInfo) -> str:
    """Return the message, in this dialect's words where clients look for them."""
    if error.code == ContextLengthError.code and error.context_tokens:
        return f"prompt is too long: {error.prompt_tokens} tokens > {error.context_tokens} maximum"
    return error.message


def error_body(error: ErrorInfo, request_id: str | None = None) -> bytes:
    """Return the envelope: the body of a refused request, and the data of an ``error`` event."""
    inner = _Error(error_type(error), error_message(error), _Details(error.code, error.unsupported))
    # ``type`` is always written: it has no default.
    return msgspec.json.encode(_Envelope("error", inner, request_id))


ENVELOPE = Envelope(
    "AnthropicError",
    object_with(type={"const": "error"}, error=object_with(type=TEXT, message=TEXT), request_id=TEXT),
    error_status,
    error_body,
)
"""The dialect's form of errors."""
