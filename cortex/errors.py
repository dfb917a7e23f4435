"""The gateway's own errors: answers to clients, as :mod:`cortex.wire.errors` are.

A cold load that fails is never a 404: the model exists, it could not be brought up.
"""

from cortex.wire.errors import (
    ApiError,
    ErrorInfo,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnprocessableError,
    UpstreamError,
)


class NoNodeError(UnavailableError):
    """No node that is up can serve or load the model now."""

    code = "no_node"


class LoadFailedError(UnavailableError):
    """A cold load failed on every node that was asked, for reasons that may pass."""

    code = "model_load_failed"


class LoadRefusedError(UnprocessableError):
    """Every node refused the load for good: the model does not fit, or cannot be read."""

    code = "model_load_refused"


class ConnectError(UpstreamError):
    """A node could not be reached; nothing was sent."""

    status = 503
    code = "upstream_unreachable"


class ConnectionLostError(UpstreamError):
    """A node closed the connection before it answered a single byte."""

    status = 503
    code = "upstream_reset"


class NodeDeniedError(UpstreamError):
    """A node does not accept the secret, or the key, that this gateway sends it."""

    code = "upstream_denied"


class TooLongAnswerError(UpstreamError):
    """A node's answer, or one event of its stream, is longer than is read."""


class CutAnswerError(UpstreamError):
    """A node closed the connection in the middle of its answer."""


class NotAnAnswerError(UpstreamError):
    """A node answered with something else than was asked for: no JSON, no stream, another encoding, another status."""


class DeadlyRequestError(UpstreamError):
    """Nodes died while they had this request, so that it is not sent to another for a while."""

    code = "upstream_died"
    worth_retrying = False


class PoolFullError(OverloadedError):
    """Every connection this gateway may open to a node is in use."""

    code = "upstream_connections_exhausted"


class PreviousResponseNotFoundError(InvalidRequestError):
    """A request continues a response that is not stored, or not any more."""

    code = "previous_response_not_found"


class ResponseNotFoundError(ApiError):
    """No response of that id is stored."""

    status = 404
    code = "response_not_found"


class ConversationNotFoundError(ApiError):
    """No conversation of that id is stored, or no item in it."""

    status = 404
    code = "conversation_not_found"


class ConversationTooLargeError(InvalidRequestError):
    """What a request continues, or refers to, is more than a body may be."""

    code = "conversation_too_large"


class ConversationFullError(InvalidRequestError):
    """A conversation has as many turns as one may have."""

    code = "conversation_full"


class GatewayStoppedError(UnavailableError):
    """The gateway that made a response ended before it."""

    code = "gateway_stopped"


class NotStartedError(UnavailableError):
    """The gateway could not start, and its server cannot be told so: ASGI without a lifespan."""

    code = "not_started"


class StoreFullError(ApiError):
    """The store of responses has no room for what was to be kept."""

    status = 507
    code = "store_full"


class StoreUnavailableError(UnavailableError):
    """The store of responses does not answer."""

    code = "store_unavailable"


class ReplyError(ApiError):
    """A node answered with an error of its own, which goes to the client as it is.

    ``body`` is the node's, an envelope in the dialect of the request; ``error`` is what is read in it for the log and
    for a stream that has begun.
    """

    def __init__(self, error: ErrorInfo, body: bytes) -> None:
        super().__init__(error.message, param=error.param, retry_after_s=error.retry_after_s)
        self.status = error.status
        self.code = error.code
        self.body = body
