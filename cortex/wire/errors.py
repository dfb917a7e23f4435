"""The errors that cross a process or reach a client, before a dialect gives them its own shape.

An :class:`ApiError` has its HTTP status, a stable code and the parameter at fault; it is independent of how OpenAI or
Anthropic write it down (see :mod:`cortex.dialects`).
"""

from typing import Final

import msgspec

MAX_MESSAGE_CHARS: Final = 2000
"""Greatest length of an error's message, which may quote outside input of any length."""


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as a value.

    ``status`` is the HTTP status a client would get before the first byte; ``code`` is stable and machine-readable;
    ``param`` names the offending field of the request; ``retry_after_s`` is set when a later retry may succeed. Of a
    prompt that is too long, ``prompt_tokens`` and ``context_tokens`` say by how much, for dialects with words of their
    own; ``unsupported`` names what a client must do without, where it can go on without it by itself.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    prompt_tokens: int = 0
    context_tokens: int = 0
    unsupported: tuple[str, ...] = ()


def _sound(message: str) -> str:
    """Return ``message`` cut to a bounded length and without lone surrogates."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}... ({len(message)} characters in all)"
    return message if message.isascii() else message.encode(errors="replace").decode()


class ApiError(Exception):
    """An error that has an HTTP response. Subclasses fix the status and the code."""

    status: int = 500
    code: str = "internal_error"
    worth_retrying: bool | None = None
    """Whether a retry may succeed, if that is stated; ``None`` leaves it to the status."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = _sound(message)
        self.param = param
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        """Return this error as a value."""
        return ErrorInfo(self.status, self.code, self.message, self.param, self.retry_after_s)


class RemoteError(ApiError):
    """An error that another process reported as :class:`ErrorInfo`; raised here unchanged."""

    def __init__(self, error: ErrorInfo) -> None:
        super().__init__(error.message, param=error.param, retry_after_s=error.retry_after_s)
        self.status = error.status
        self.code = error.code
        self._error = error

    def info(self) -> ErrorInfo:
        """Return the error as it was reported."""
        return self._error


class InvalidRequestError(ApiError):
    """The request is wrong and stays wrong: do not retry."""

    status = 400
    code = "invalid_value"


class InvalidJsonError(InvalidRequestError):
    """The body is not JSON, or not a JSON object."""

    code = "invalid_json"


class MissingParameterError(InvalidRequestError):
    """A required field is absent."""

    code = "missing_required_parameter"


class InvalidTypeError(InvalidRequestError):
    """A field has the wrong JSON type."""

    code = "invalid_type"


class UnsupportedParameterError(InvalidRequestError):
    """A field asks for something this server does not do; it is refused rather than ignored."""

    code = "unsupported_parameter"


class UnknownParameterError(InvalidRequestError):
    """A field is unknown, and the client's key asks for unknown fields to be refused."""

    code = "unknown_parameter"


class TooManyItemsError(InvalidRequestError):
    """The body has more items, members or values than the server works through."""

    code = "too_many_items"


class TooDeepError(InvalidRequestError):
    """The body is nested deeper than the server reads."""

    code = "too_deep"


class InvalidSchemaError(InvalidRequestError):
    """A schema, expression or grammar that the answer should follow cannot be compiled."""

    code = "invalid_schema"

    def __init__(self, problem: str, *, param: str | None = None) -> None:
        super().__init__(f"Invalid schema: {problem}.", param=param)


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the context. Clients compact their history by this code and phrase."""

    code = "context_length_exceeded"

    def __init__(
        self, context_tokens: int, prompt_tokens: int, *, param: str | None = None, at_least: bool = False
    ) -> None:
        """``at_least``: counting ended there."""
        super().__init__(
            f"This model's maximum context length is {context_tokens} tokens. However, your messages resulted in "
            f"{'at least ' if at_least else ''}{prompt_tokens} tokens. Please reduce the length of the messages.",
            param=param,
        )
        self._tokens = (prompt_tokens, context_tokens)

    def info(self) -> ErrorInfo:
        """Return this error as a value."""
        return ErrorInfo(self.status, self.code, self.message, self.param, None, *self._tokens)


class ToolCallNotFoundError(InvalidRequestError):
    """A result of a tool answers no call of the conversation, or one that has its result already."""

    code = "tool_call_not_found"


class ThreadUnsupportedError(InvalidRequestError):
    """Anthropic's ``thread`` is not supported: clients must send the whole conversation."""

    code = "thread_unsupported_request"

    def info(self) -> ErrorInfo:
        """Return this error as a value."""
        return ErrorInfo(self.status, self.code, self.message, self.param, unsupported=("thread",))


class ChainedConversationError(InvalidRequestError):
    """A neuron was given ``previous_response_id``; chains are resolved by the gateway."""

    code = "chained_conversation_not_supported"


class UnauthorizedError(ApiError):
    """The request has no key, or an unknown one."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(ApiError):
    """The key is known and lacks the permission."""

    status = 403
    code = "permission_denied"


class BodyTooLargeError(ApiError):
    """The body is longer than the server reads."""

    status = 413
    code = "request_too_large"


class SlowBodyError(ApiError):
    """The body takes longer to arrive than the server waits; the connection is closed."""

    status = 408
    code = "request_timeout"


class UnsupportedEncodingError(ApiError):
    """The body is compressed in a way that is not read here."""

    status = 415
    code = "unsupported_encoding"


class NotFoundError(ApiError):
    """The path does not exist."""

    status = 404
    code = "unknown_url"


class MethodNotAllowedError(ApiError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class ModelNotFoundError(ApiError):
    """The model is unknown."""

    status = 404
    code = "model_not_found"


class UnprocessableError(ApiError):
    """The request is well-formed and cannot be carried out as asked."""

    status = 422
    code = "unprocessable"


class OverloadedError(ApiError):
    """The queue is full: slow down and try again."""

    status = 429
    code = "rate_limit_exceeded"


class UnavailableError(ApiError):
    """The request cannot be served now: a load, a recovery, a drain, or no usable node."""

    status = 503
    code = "service_unavailable"


class NoHarnessError(UnavailableError):
    """This node has no harness that can run inference."""

    code = "no_harness"


class UpstreamError(ApiError):
    """A node could not be reached, or ended its answer too early."""

    status = 502
    code = "upstream_error"


class UpstreamTimeoutError(UpstreamError):
    """A node accepted the request and then stayed silent."""

    status = 504
    code = "upstream_timeout"
