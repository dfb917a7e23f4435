"""Headers of a call: principal, priority and model name from the gateway, ignored parameters in the answer."""

import logging
import re
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from cortex.dialects.call import GenerationCall
from cortex.dialects.embeddings.request import EmbeddingCall
from cortex.dialects.parameters import add_header
from cortex.http_io import Exchange
from cortex.wire.errors import InvalidRequestError
from cortex.wire.headers import IGNORED, MODEL_NAME, OMITTED_PARTS, PRINCIPAL, PRIORITY, requested_model_name
from cortex.wire.request import EmbeddingRequest, InferenceRequest

_log = logging.getLogger("neuron.api")

_PRIORITY = re.compile(rb"[+-]?[0-9]{1,9}")
_Request = TypeVar("_Request", InferenceRequest, EmbeddingRequest)


def report_call(exchange: Exchange, call: GenerationCall | EmbeddingCall) -> None:
    """Report unknown members of the body, and the number of omitted content parts, in the answer's headers."""
    if call.num_omitted:
        add_header(exchange.extra_headers, OMITTED_PARTS, b"%d" % call.num_omitted)
    report_ignored(exchange, call.ignored)


def report_ignored(exchange: Exchange, names: Sequence[str]) -> None:
    """Report ignored parameters in the answer's headers."""
    if names:
        add_header(exchange.extra_headers, IGNORED, ",".join(names).encode())
        _log.info("id=%s ignored=%s", exchange.request_id, exchange.extra_headers[IGNORED].decode())


def requested_name(exchange: Exchange, request: InferenceRequest | EmbeddingRequest) -> str:
    """Return the model's name in the answer: that of the client's request, if the gateway sent it."""
    return requested_model_name(exchange.header(MODEL_NAME), request.model)


def on_behalf(exchange: Exchange, request: _Request) -> _Request:
    """Return ``request`` with its principal and priority, if the gateway named them.

    Raises:
        InvalidRequestError: the priority is not an integer.
    """
    principal, priority = exchange.header(PRINCIPAL), exchange.header(PRIORITY)
    if not principal and not priority:
        return request
    if priority and _PRIORITY.fullmatch(priority) is None:
        raise InvalidRequestError(f"The header {PRIORITY.decode()} is not an integer.")
    return msgspec.structs.replace(
        request, principal=(principal or b"").decode("latin-1"), priority=int(priority or b"0")
    )
