"""Errors of the OpenAI dialects: the envelope, its type, and the code of a failed response.

SDKs choose their exception by the HTTP status; clients then read ``code``, which is passed on as it is.
"""

import msgspec

from cortex.wire.errors import ContextLengthError, ErrorInfo

_QUOTA_CODE = "insufficient_quota"

# Values of ``response.error.code``: those of openai 3.54's list that can arise here, and the code by which agents
# compact. It is not on the list, but counting a long prompt takes so long that the error comes after the headers, and
# agents do not react to ``invalid_prompt``. The SDKs raise on the ``error`` event before they read it.
_RESPONSE_CODES = frozenset({"server_error", "rate_limit_exceeded", "invalid_prompt", ContextLengthError.code})


class _Error(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


def error_type(error: ErrorInfo) -> str:
    """Return the ``type`` of an error, by its status."""
    if error.code == _QUOTA_CODE:
        return _QUOTA_CODE
    match error.status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 429:
            return "rate_limit_error"
        case status if status < 500:
            return "invalid_request_error"
        case _:
            return "server_error"


def error_object(error: ErrorInfo) -> bytes:
    """Return the inner object of the envelope: ``message``, ``type``, ``param`` and ``code``."""
    return msgspec.json.encode(_Error(error.message, error_type(error), error.param, error.code))


def error_body(error: ErrorInfo) -> bytes:
    """Return the envelope: the body of a refused request, and the last data of a chat stream that fails."""
    return b'{"error":%b}' % error_object(error)


def response_error_code(error: ErrorInfo) -> str:
    """Return the ``code`` of a failed response: the error's own if clients know it, else by status."""
    if error.code in _RESPONSE_CODES:
        return error.code
    if error.status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.status < 500 else "server_error"
