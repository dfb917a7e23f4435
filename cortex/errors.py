"""Errors of the gateway: answers to clients, like those of :mod:`cortex.wire.errors`.

A cold load that fails is never a 404: the model exists, and could not be loaded.
"""

from cortex.wire.errors import (
    ApiError,
    ErrorInfo,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
    UnprocessableError,
    UpstreamError,
)


class NoNodeError(UnavailableError):
    """No node that is up can serve or load the model now."""

    code = "no_node"


class LoadFailedError(UnavailableError):
    """A cold load failed on every node tried, for reasons that may pass."""

    code = "model_load_failed"


class LoadRefusedError(UnprocessableError):
    """Every node refused the load for good: the model does not fit, or cannot be read."""

    code = "model_load_refused"


class UnknownNodeError(NotFoundError):
    """No node of that name is configured."""

    code = "node_not_found"


class NothingFitsError(UnprocessableError):
    """No node has the memory for any of a model's weights."""

    code = "model_does_not_fit"


class ModelExistsError(ApiError):
    """An added model has the name of another one of the catalogue, which stays as it is."""

    status = 409
    code = "model_exists"


class ModelNotAddedError(ApiError):
    """A model was not added by a command, so that none removes it."""

    status = 409
    code = "model_not_added"


class CatalogueNotWritableError(ApiError):
    """The file of added models cannot be written."""

    code = "catalogue_not_writable"


class KeyExistsError(ApiError):
    """A new key has the name of another one, which stays as it is."""

    status = 409
    code = "key_exists"


class KeyNotFoundError(NotFoundError):
    """There is no key of that name."""

    code = "key_not_found"


class KeyNotAddedError(ApiError):
    """A key is in ``keys.toml``, which no gateway writes."""

    status = 409
    code = "key_not_added"


class KeysNotWritableError(ApiError):
    """The file of added keys cannot be written, or what is written is not in force."""

    code = "keys_not_writable"


class ConnectError(UpstreamError):
    """A node could not be reached; nothing was sent."""

    status = 503
    code = "upstream_unreachable"


class ConnectionLostError(UpstreamError):
    """A node closed the connection before it answered a single byte."""

    status = 503
    code = "upstream_reset"


class NodeDeniedError(UpstreamError):
    """A node rejects the secret or key that this gateway sends."""

    code = "upstream_denied"


class TooLongAnswerError(UpstreamError):
    """A node's answer, or an event of its stream, exceeds the size limit."""


class CutAnswerError(UpstreamError):
    """A node closed the connection in the middle of its answer."""


class NotAnAnswerError(UpstreamError):
    """A node's response is not of the expected kind: no JSON, no stream, another encoding, another status."""


class DeadlyRequestError(UpstreamError):
    """Nodes died while they processed this request, so that it is sent to no other for a while."""

    code = "upstream_died"
    worth_retrying = False


class PoolFullError(OverloadedError):
    """Every connection this gateway may open to a node is in use."""

    code = "upstream_connections_exhausted"


class PreviousResponseNotFoundError(InvalidRequestError):
    """A request continues a response that is not stored, or no longer."""

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
    """The stored items that a request continues or refers to exceed the size limit of a body."""

    code = "conversation_too_large"


class ConversationFullError(InvalidRequestError):
    """A conversation has the maximum number of responses."""

    code = "conversation_full"


class GatewayStoppedError(UnavailableError):
    """The gateway that made a response ended before it."""

    code = "gateway_stopped"


class NotStartedError(UnavailableError):
    """The gateway could not start, and its server has no way to report it: ASGI without a lifespan."""

    code = "not_started"


class StoreFullError(ApiError):
    """The store of responses is full."""

    status = 507
    code = "store_full"


class StoreUnavailableError(UnavailableError):
    """The store of responses does not answer."""

    code = "store_unavailable"


class ReplyError(ApiError):
    """A node answered with an error, which the client gets unchanged.

    ``body`` is the node's, an envelope in the dialect of the request; ``error`` is the error in it, for the log and for
    a stream that has begun.
    """

    def __init__(self, error: ErrorInfo, body: bytes) -> None:
        super().__init__(error.message, param=error.param, retry_after_s=error.retry_after_s)
        self.status = error.status
        self.code = error.code
        self.body = body
