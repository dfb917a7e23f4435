"""Parsing of a node's error responses: the party at fault, and the error that the client gets.

A node's error is forwarded as it is only where it is valid: a JSON object with an ``error``. Anything else (HTML, an
empty or compressed body, a redirect) becomes the gateway's own error, so that the client gets its dialect in any case.
"""

import re

import orjson

from cortex._fast.http_client import Response
from cortex.dialects.translate import translated_error
from cortex.errors import NodeDeniedError, NotAnAnswerError, ReplyError
from cortex.wire.errors import ApiError, ErrorInfo, RemoteError, UpstreamError

MAX_ERROR_BYTES = 1024 * 1024
MAX_TEXT = 8192
"""Characters that are kept of a node's error message."""
MAX_RETRY_AFTER_S = 3600.0
CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""Pattern of the error codes that may get into a log line or a label."""

BACK_PRESSURE = frozenset({429, 503, 529})

OWN_FAULTS = frozenset({"device_worker_lost", "no_device", "no_harness"})
"""Error codes of a neuron that is itself at fault, whatever the request.

No status is enough for that: a request can make a server answer 500.
"""

DEATHS = frozenset({"device_worker_lost"})
"""Error codes of a neuron whose worker process was lost while it had the request."""

AMBIGUOUS = frozenset({500, 502, 504})
"""Statuses of a node that failed, possibly because of the request."""


def wrong_head(response: Response, *, is_stream: bool) -> str | None:
    """Return a description of the fault in the head of a 200; ``None`` if its body may be read."""
    encoding = response.header(b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
        return f"in the encoding {_shown(encoding)}, which was not asked for"
    if is_stream:
        content_type = response.header(b"content-type") or b""
        if not content_type.lower().startswith(b"text/event-stream"):
            return f"a streamed request with {_shown(content_type)}"
    return None


async def read_refusal(node: str, response: Response, stall_s: float, *, is_chat: bool) -> ApiError:
    """Return the error of a response, with its body unless that is in another dialect than the caller's.

    Raises:
        UpstreamError: the body could not be read.
    """
    if response.status < 400 or response.status > 599:
        location = response.header(b"location")
        where = "" if location is None else f" to {_shown(location)}, and redirects are not followed"
        return NotAnAnswerError(f"{node} answered with status {response.status}{where}.")
    response.end_within(stall_s)
    body = await response.read_all(MAX_ERROR_BYTES)
    if response.status in (401, 407):
        return NodeDeniedError(f"{node} does not accept what this gateway sends as its secret.")
    retry_after = response.header(b"retry-after")
    error, is_whole = read_error(response.status, body, retry_after)
    if is_chat:
        return RemoteError(translated_error(error))
    if not is_whole:
        return RemoteError(error)
    return ReplyError(error, body)


def read_error(status: int, body: bytes, retry_after: bytes | None = None) -> tuple[ErrorInfo, bool]:
    """Return the error in a node's response, and whether its body is a valid error envelope."""
    retry_after_s = seconds_of(retry_after)
    fallback = ErrorInfo(status, UpstreamError.code, f"The node answered with status {status}.", None, retry_after_s)
    error = find_error(body)
    if error is None:
        return fallback, False
    message, code, param = error.get("message"), error.get("code"), error.get("param")
    details = error.get("details")
    if code is None and isinstance(details, dict):  # where the Anthropic dialect has it
        code = details.get("error_code")
    read = ErrorInfo(
        status,
        code if isinstance(code, str) and CODE.fullmatch(code) else ApiError.code,
        message[:MAX_TEXT] if isinstance(message, str) else fallback.message,
        param[:MAX_TEXT] if isinstance(param, str) else None,
        retry_after_s,
    )
    return read, True


def find_error(body: bytes) -> dict[str, object] | None:
    """Return the error in an envelope of any dialect; ``None`` if the body is no envelope."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) else None


def seconds_of(header: bytes | None) -> float | None:
    """Return the seconds of a ``Retry-After``, an hour at most; ``None`` if it is no number."""
    if header is None or not header.isdigit():
        return None
    return min(float(header[:9]) if len(header) <= 9 else MAX_RETRY_AFTER_S, MAX_RETRY_AFTER_S)


def _shown(value: bytes) -> str:
    return ascii(value[:80].decode("latin-1")) if value else "no content type"
