"""Headers and status codes that both daemons use, and the values of these headers."""

import math
import random
import re
import urllib.parse

CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client disconnected before the answer was complete, in logs and metrics (as in nginx)."""

REQUEST_ID = b"x-request-id"

IGNORED = b"x-cortex-ignored"
"""Response header: paths of members that the server does not know, and of tools that it cannot run."""

OMITTED_PARTS = b"x-cortex-omitted-parts"
"""Response header: number of content parts of earlier messages that were replaced by a sentence about them."""

FORWARDED = (IGNORED, OMITTED_PARTS)
"""Headers of a node's response that the gateway forwards to the client."""

MODEL_NAME = b"x-cortex-model-name"
"""Header to a node: the name by which the client asked for the model, percent-encoded; the answer repeats it."""

MAX_MODEL_NAME_BYTES = 1024
"""Length of the ``MODEL_NAME`` value; a longer name is not sent, and the answer has the model's own name."""

REPORT_USAGE = b"x-cortex-report-usage"
"""Header to a node: end a stream with a comment that reports its usage, whether or not the client asked for usage."""

PRINCIPAL = b"x-cortex-principal"
"""Header to a node: name of the principal; slots are shared out among principals."""

PRIORITY = b"x-cortex-priority"
"""Header to a node: the principal's priority, an integer; absent if it is 0."""

RESPONSE_CONTEXT = b"x-cortex-response"
"""Header to a node: members of a response object that the gateway decides, as JSON."""

_REQUEST_ID_VALUE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_of(given: bytes | None) -> str:
    """Return the caller's request id if it is fit to be logged and sent on, else a new id."""
    if given is not None and _REQUEST_ID_VALUE.fullmatch(given):
        return given.decode()
    return f"req_{random.getrandbits(96):024x}"


def retry_after(seconds: float) -> bytes:
    """Return the value of a ``Retry-After`` header: whole seconds, rounded up, at least one."""
    return b"%d" % max(1, math.ceil(seconds))


def model_name_headers(name: str, model: str) -> tuple[tuple[bytes, bytes], ...]:
    """Return the header that carries ``name``, by which ``model`` was asked for; none if that is the model's own."""
    if name == model:
        return ()
    value = urllib.parse.quote(name, safe="/:@+", errors="replace").encode()
    return ((MODEL_NAME, value),) if len(value) <= MAX_MODEL_NAME_BYTES else ()


def requested_model_name(value: bytes | None, model: str) -> str:
    """Return the name by which an answer calls ``model``, given the value of the ``MODEL_NAME`` header."""
    if not value or len(value) > MAX_MODEL_NAME_BYTES:
        return model
    return urllib.parse.unquote(value.decode("latin-1")) or model
