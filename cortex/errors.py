"""The gateway's own errors: answers to clients, as :mod:`cortex.wire.errors` are.

A cold load that fails is never a 404: the model exists, it could not be brought up.
"""

from cortex.wire.errors import (
    ApiError,
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


class GatewayStoppedError(UnavailableError):
    """The gateway that made a response ended before it."""

    code = "gateway_stopped"


class StoreUnavailableError(UnavailableError):
    """The store of responses does not answer."""

    code = "store_unavailable"


class ReplyError(ApiError):
    """A node answered with an error of its own, which goes to the client as it is.

    ``body`` is the node's, in the dialect of the request; message, code and param are read from it for the log and
    for a stream that has begun.
    """

    def __init__(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: bytes | None = None,
    ) -> None:
        retry_after_s = float(retry_after) if retry_after is not None and retry_after.isdigit() else None
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.status = status
        self.code = code
        self.body = body
        self.content_type = content_type
        self.retry_after = retry_after
