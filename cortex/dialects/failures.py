"""Errors with which nodes end streams, in any dialect."""

import orjson

from cortex._fast.sse import SseDecoder
from cortex.dialects.usage import clean_finish
from cortex.wire.errors import ErrorInfo, UpstreamError

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


def read_failure(last: bytes) -> ErrorInfo:
    """Return the error that a node ended a stream with, given the last bytes of that."""
    sse_events = reversed(SseDecoder(len(last) + 1).feed(last))
    found = [error for sse_event in sse_events if (error := _error_in(sse_event.data)) is not None]
    # The last event of a response has few codes; the one before it has the error's own.
    exact = (error for error in found if error.code not in VAGUE)
    return next(exact, None) or next(iter(found), ErrorInfo(UpstreamError.status, "failed", "The node failed."))


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
